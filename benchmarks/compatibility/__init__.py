"""Compares every public trainer under this package with plain code; the results are in ``docs/compatibility.md``."""
