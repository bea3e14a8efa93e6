"""``python -m hf_zo.estimate``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
