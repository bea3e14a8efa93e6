"""Prints the oldest versions that pyproject.toml promises as constraints for pip, one a line.

    pip install -c <(python .ci/oldest.py) -e '.[dev]'

Each ``name[extras]>=version`` becomes ``name==version``, so the promises and what CI runs on cannot part.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

LOWEST = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)")


def oldest() -> dict[str, str]:
    """The lowest version of each package that the project or one of its extras needs, but for the documentation."""
    path = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = {name: needed for name, needed in project["optional-dependencies"].items() if name != "docs"}
    requirements = [*project["dependencies"], *(one for needed in extras.values() for one in needed)]
    return dict(found.groups() for one in requirements if (found := LOWEST.match(one)))


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in oldest().items()))
