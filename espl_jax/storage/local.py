"""A folder of this machine: written through to the disk, replaced by renames, locked, logs appended to."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from espl_jax.storage import durable


class LocalFolder:
    """A folder and what is in it; names are relative to it and may have slashes.

    Attributes:
      path: the folder, absolute.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock: BinaryIO | None = None

    def hold(self) -> None:
        """Makes the folder and takes it for this process until `release` or its death.

        Raises:
          RuntimeError: another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = durable.lock(self.path)

    def check_held(self) -> None:
        """Nothing to do: nobody can take the folder away."""

    def release(self) -> None:
        """Gives the folder up."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file and waits until it is on the disk: after a kill it is the old one or the new one."""
        durable.replace(self.path / name, content)

    def names(self, name: str) -> list[str]:
        """What a folder in this one holds; empty where there is none."""
        path = self.path / name
        return sorted(os.listdir(path)) if path.is_dir() else []

    def make(self, name: str) -> None:
        """Makes a folder in this one, whose name is then on the disk."""
        path = self.path / name
        with durable.disk_full_explained(path):
            path.mkdir(exist_ok=True)
            durable.sync_folder(path.parent)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        durable.sync_folder(path.parent)

    def log(self, name: str) -> LocalLog:
        """The log in the file of that name."""
        return LocalLog(self.path / name)


class LocalLog:
    """A file that grows at its end, by one process; made when first appended to.

    Attributes:
      path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO | None = None
        self._end = 0

    def length(self) -> int:
        """Bytes in it."""
        return self._end if self._file else durable.size(self.path)

    def append(self, content: bytes) -> None:
        """Adds bytes, where others can read them at once.

        Raises:
          OSError: the disk is full, or the file cannot be written. The file is then as it was before.
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
        """Waits until all that was appended is on the disk."""
        if self._file:
            with durable.disk_full_explained(self.path):
                os.fsync(self._file.fileno())

    def read(self, begin: int, length: int) -> bytes:
        """Those bytes of it."""
        with open(self.path, "rb") as file:
            file.seek(begin)
            return file.read(length)

    def lines(self) -> Iterator[bytes]:
        """Every line with its newline; the last may lack it."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                yield from file

    def cut_back(self, length: int) -> None:
        """Drops what it holds beyond `length` bytes. Raises ValueError if it is shorter than that."""
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
        # Unbuffered, so that what a failed write leaves is in the file, where it can be cut off.
        self._file = file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._end = durable.size(self.path)
        if is_new:
            durable.sync_folder(self.path.parent)
        return file
