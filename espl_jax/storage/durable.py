"""Files that survive a kill or a power cut: written through to the disk, replaced whole, locked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk. A kill in between leaves a part of it."""
    with disk_full_explained(path), open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Replaces a file: readers, and whoever comes after a kill, see the old content or the new one."""
    new = path.with_name(f".{path.name}.new")
    write(new, content)
    os.replace(new, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Waits until the folder's list of names is on the disk; syncing a file alone does not keep its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size(path: Path) -> int:
    """Bytes in a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def cut_back(path: Path, length: int) -> None:
    """Drops what an append-only file holds beyond `length` bytes.

    Raises:
      ValueError: the file is shorter than that.
    """
    if size(path) < length:
        raise ValueError(
            f"{path} has {size(path)} bytes, but its checkpoint counts {length}: put the whole file back, or "
            "use another --workdir"
        )
    if size(path) > length:
        with open(path, "r+b") as file:
            file.truncate(length)
            os.fsync(file.fileno())


def lock(folder: Path) -> BinaryIO:
    """Takes the folder for this process; closing what is returned, or the end of the process, gives it up.

    Raises:
      RuntimeError: another process has it.
    """
    file = open(folder / ".lock", "a+b")  # noqa: SIM115 (open for as long as the folder is held)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode() or "unknown"
        file.close()
        raise RuntimeError(
            f"{folder} is in use by process {holder}: stop it first, or give this run another --workdir"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    file.flush()
    return file


@contextlib.contextmanager
def disk_full_explained(path: os.PathLike[str]) -> Iterator[None]:
    """Says what to do when the disk is full; every other error passes unchanged."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (full or "No space left on device" in str(error)):
            raise
        raise OSError(
            errno.ENOSPC,
            "the disk is full: free some space and give the same command again; a run goes on from its "
            "newest checkpoint",
            str(path),
        ) from error
