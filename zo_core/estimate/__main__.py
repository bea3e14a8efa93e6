"""``python -m zo_core.estimate``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
