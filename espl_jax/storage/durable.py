"""Durable file operations: fsynced writes, atomic replacement, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def write(path: Path, content: bytes) -> None:
    """Writes and fsyncs a file. Not atomic: a kill may leave a partial file."""
    with disk_full_explained(path), open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes, shared: bool = False) -> None:
    """Replaces a file atomically: readers see either the old or the new content, also after a kill.

    Args:
      path: of the file.
      content: its new content.
      shared: whether another process may replace the file at the same time. Otherwise the temporary file has
        the same name every time, so that kills do not leave more than one behind.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new" if shared else f".{path.name}.new")
    write(new, content)
    os.replace(new, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Fsyncs a folder, which makes the names of its files durable; syncing a file alone does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size(path: Path) -> int:
    """Returns the size of a file in bytes; 0 if there is no file."""
    return path.stat().st_size if path.exists() else 0


def cut_back(path: Path, length: int) -> None:
    """Truncates an append-only file to `length` bytes.

    Raises:
      ValueError: if the file is shorter than that.
    """
    if size(path) < length:
        raise ValueError(
            f"{path} has {size(path)} bytes, but {length} at its checkpoint; restore the whole file, or use "
            "another --workdir"
        )
    if size(path) > length:
        with open(path, "r+b") as file:
            file.truncate(length)
            os.fsync(file.fileno())


def lock(folder: Path) -> BinaryIO:
    """Locks a folder for this process. Closing the returned file, or the end of the process, unlocks it.

    Raises:
      RuntimeError: if another process holds the lock.
    """
    file = open(folder / ".lock", "a+b")  # noqa: SIM115 (stays open while the folder is locked)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode() or "unknown"
        file.close()
        raise RuntimeError(
            f"{folder} is in use by process {holder}; stop it first, or use another --workdir"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    file.flush()
    return file


@contextlib.contextmanager
def hold(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds a lock file, which stays; the end of the process releases it, however it ends.

    Args:
      path: of the file, which is created if necessary.
      waiting: called once if another process holds the lock, before waiting for it.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def disk_full_explained(path: os.PathLike[str]) -> Iterator[None]:
    """Adds the fix to the error of a full disk; other errors pass unchanged."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (full or "No space left on device" in str(error)):
            raise
        raise OSError(
            errno.ENOSPC,
            "the disk is full; free some space and run the same command again: a run resumes from its "
            "newest checkpoint",
            str(path),
        ) from error
