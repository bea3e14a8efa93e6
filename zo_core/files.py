"""Atomic writes: a file is either complete or as it was before, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

#: Errors of file systems that cannot sync a folder.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a file under a temporary name, and renames it to ``path`` once it is complete and synced to disk.

        with replacing("model.safetensors") as fresh:
            save_file(tensors, fresh)

    After the block the new file survives a power failure. If the block raises, or the disk is full, the
    unfinished file is removed, and an earlier file at ``path`` is unchanged.

    Args:
        path: path of the file; its folder has to exist.

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
    """Creates or replaces a file; see `replacing`."""
    with replacing(path) as fresh:
        fresh.write_bytes(data)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def removed_with(owner: T, folder: str | os.PathLike[str]) -> weakref.finalize[..., T]:
    """Removes a temporary folder at the end of an object or of this process, and not at that of a fork."""
    return weakref.finalize(owner, _remove, folder, os.getpid())


def _remove(folder: str | os.PathLike[str], process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
