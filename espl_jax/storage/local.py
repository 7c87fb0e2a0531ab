"""A local folder: files are replaced atomically and fsynced, logs are appended to, the folder is locked."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from espl_jax.storage import durable


class LocalFolder:
    """A folder and its files; names are relative to it and may contain slashes.

    Attributes:
      path: the folder, absolute.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock: BinaryIO | None = None

    def hold(self) -> None:
        """Creates the folder and locks it for this process until `release` or the end of the process.

        Raises:
          RuntimeError: if another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = durable.lock(self.path)

    def check_held(self) -> None:
        """Does nothing: a locked folder cannot be taken over."""

    def release(self) -> None:
        """Unlocks the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def read(self, name: str) -> bytes | None:
        """Returns the content of a file, or None if there is none."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file atomically and fsyncs it: after a kill it has the old or the new content."""
        durable.replace(self.path / name, content)

    def names(self, name: str) -> list[str]:
        """Lists a subfolder; empty if there is none."""
        path = self.path / name
        return sorted(os.listdir(path)) if path.is_dir() else []

    def make(self, name: str) -> None:
        """Creates a subfolder and fsyncs its name."""
        path = self.path / name
        with durable.disk_full_explained(path):
            path.mkdir(exist_ok=True)
            durable.sync_folder(path.parent)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with its contents."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        durable.sync_folder(path.parent)

    def log(self, name: str) -> LocalLog:
        """Returns the log in the file of that name."""
        return LocalLog(self.path / name)


class LocalLog:
    """An append-only file, written by one process; created at the first append.

    Attributes:
      path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO | None = None
        self._end = 0

    def length(self) -> int:
        """Returns its length in bytes."""
        return self._end if self._file else durable.size(self.path)

    def append(self, content: bytes) -> None:
        """Appends bytes, which readers see at once.

        Raises:
          OSError: if the disk is full or the file cannot be written. The file is then unchanged.
        """
        with durable.disk_full_explained(self.path):
            file = self._file or self._open()
            try:
                written = 0
                while written < len(content):
                    written += os.pwrite(file.fileno(), content[written:], self._end + written)
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(self._end)
                raise
            self._end += len(content)

    def sync(self) -> None:
        """Fsyncs everything appended so far."""
        if self._file:
            with durable.disk_full_explained(self.path):
                os.fsync(self._file.fileno())

    def read(self, begin: int, length: int) -> bytes:
        """Returns `length` bytes from offset `begin`."""
        with open(self.path, "rb") as file:
            file.seek(begin)
            return file.read(length)

    def lines(self) -> Iterator[bytes]:
        """Yields every line with its newline; the last line may lack it."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                yield from file

    def cut_back(self, length: int) -> None:
        """Truncates the log to `length` bytes. Raises ValueError if it is shorter than that."""
        self._end = min(self._end, length)
        durable.cut_back(self.path, length)

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        if is_new := not self.path.exists():
            self.path.touch()
        # Unbuffered, so that a partial write is in the file, where it can be truncated.
        self._file = file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._end = durable.size(self.path)
        if is_new:
            durable.sync_folder(self.path.parent)
        return file
