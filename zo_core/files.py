"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What file systems answer that have no way to sync a folder.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a file under another name and lets it take the place of ``path`` when it is whole and on the disk.

        with replacing("model.safetensors") as fresh:
            save_file(tensors, fresh)

    After the block the new file survives a loss of power. If the block raises, or the disk is full, the
    unfinished file is removed, and what was at ``path`` is still there.

    Args:
        path: of the file, in a folder that exists.

    Yields:
        The name to write to, in the same folder.

    Raises:
        OSError: the file could not be written.
    """
    path = Path(path)
    fresh = path.with_name(f"{path.name}.tmp")
    try:
        yield fresh
        _sync(fresh)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    try:
        _sync(path.parent)  # the new name is an entry of the folder
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Makes or replaces a file; see `replacing`."""
    with replacing(path) as fresh:
        fresh.write_bytes(data)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
