"""Every public trainer, with this package and written out; the table of it is ``docs/compatibility.md``."""
