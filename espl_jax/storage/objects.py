"""A folder in a bucket: each object is written atomically, and each sync of a log adds an object.

Buckets have no renames, appends or locks; all they guarantee is that an object has either its old or its new
content. A log is a folder of parts, each named by the offset of its first byte. The log consists of the parts
that follow one another without a gap from offset 0.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import logging
from etils import epath

_HOLDER = ".holder"
_AT_ONCE = 16  # parts that are read concurrently


class ObjectFolder:
    """The objects whose names begin with `path`; names are relative to it and may contain slashes.

    Attributes:
      path: the folder, with its `gs://`.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self._files = _file_system()
        self._holder = b""

    def hold(self) -> None:
        """Takes over the folder, even from another process: a dead holder looks the same as a slow one.

        The previous holder fails at its next write (`check_held`). Both could still write in the instant
        between that check and the write, so never start two runs in one folder.
        """
        before = self.read(_HOLDER)
        if before:
            logging.warning("%s was held by process %s; taking it over", self.path, before.decode())
        holder = f"{os.getpid()} on {socket.gethostname()} ({uuid.uuid4().hex[:8]})".encode()
        self.write(_HOLDER, holder)
        self._holder = holder

    def check_held(self) -> None:
        """Raises RuntimeError if another process has taken the folder since `hold`."""
        found = self.read(_HOLDER) or b""
        if found != self._holder:
            raise RuntimeError(
                f"{self.path} has been taken over from this process, {self._holder.decode()}, by process "
                f"{found.decode() or 'unknown'}; stop the other process, or use another --workdir"
            )

    def release(self) -> None:
        """Releases the folder, unless it has been taken over."""
        if self._holder and self.read(_HOLDER) == self._holder:
            self.remove(_HOLDER)
        self._holder = b""

    def read(self, name: str) -> bytes | None:
        """Returns the content of an object, or None if there is none."""
        return _read(self._files, self.path / name)

    def write(self, name: str, content: bytes) -> None:
        """Writes an object atomically: readers see the old or the new content."""
        if self._holder:
            self.check_held()
        _write(self._files, self.path / name, content)

    def names(self, name: str) -> list[str]:
        """Lists a subfolder; empty if there is none."""
        return sorted(_sizes(self._files, self.path / name))

    def make(self, name: str) -> None:
        """Does nothing: a folder exists as soon as an object is in it."""

    def remove(self, name: str) -> None:
        """Removes an object, or all objects in a folder."""
        if self._holder:
            self.check_held()
        _remove(self._files, self.path / name)

    def log(self, name: str) -> ObjectLog:
        """Returns the log in the subfolder of that name; it is written only while this folder is held."""
        return ObjectLog(self.path / name, self.check_held)


class ObjectLog:
    """A log stored as parts, written by one process.

    Attributes:
      path: the folder of the parts.
    """

    def __init__(self, path: epath.Path, check_held: Callable[[], None] = lambda: None):
        self.path = path
        self._check_held = check_held
        self._files = _file_system()
        self._parts: dict[int, int] | None = None
        self._tail = bytearray()

    def length(self) -> int:
        """Returns its length in bytes, including bytes not yet written."""
        return self._end() + len(self._tail)

    def append(self, content: bytes) -> None:
        """Appends bytes, which readers see after the next `sync`."""
        self._tail += content

    def sync(self) -> None:
        """Writes the bytes appended since the last sync as a new object.

        Raises:
          OSError: if the object cannot be written. The bytes are kept for the next sync.
        """
        if self._tail:
            self._check_held()
            begin = self._end()
            _write(self._files, self._part(begin), bytes(self._tail))
            self._listed()[begin] = len(self._tail)
            self._tail.clear()

    def read(self, begin: int, length: int) -> bytes:
        """Returns `length` bytes from offset `begin`."""
        end = self._end()
        if begin >= end:
            return bytes(self._tail[begin - end :][:length])
        first = max(start for start in self._listed() if start <= begin)
        content = _read(self._files, self._part(first)) or b""
        found = content[begin - first :][:length]
        if len(found) < length and first + len(content) < self.length():
            found += self.read(first + len(content), length - len(found))
        return found

    def lines(self) -> Iterator[bytes]:
        """Yields every line with its newline; the last line may lack it."""
        parts = self._listed()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            contents = pool.map(lambda begin: _read(self._files, self._part(begin)) or b"", parts)
            yield from io.BytesIO(b"".join([*contents, self._tail]))

    def cut_back(self, length: int) -> None:
        """Truncates the log to `length` bytes, and removes parts after a gap.

        Raises:
          ValueError: if it is shorter than that.
        """
        end = self._end()
        if self.length() < length:
            raise ValueError(
                f"{self.path} has {self.length()} bytes, but {length} at its checkpoint; restore the whole "
                "folder, or use another --workdir"
            )
        del self._tail[max(0, length - end) :]
        for begin, size in list(self._listed().items()):
            if begin < length < begin + size:
                _write(self._files, self._part(begin), self.read(begin, length - begin))
        for name in _sizes(self._files, self.path):
            if name.isdigit() and int(name) >= length:
                _remove(self._files, self.path / name)
        self._parts = None

    def close(self) -> None:
        """Writes the bytes that are not yet written."""
        self.sync()

    def _end(self) -> int:
        """Returns the offset at which the parts end."""
        parts = self._listed()
        last = max(parts, default=0)
        return last + parts.get(last, 0)

    def _listed(self) -> dict[int, int]:
        """Returns the parts; lists them at the first call."""
        if self._parts is None:
            sizes = _sizes(self._files, self.path)
            found = {int(name): size for name, size in sizes.items() if name.isdigit()}
            self._parts, begin = {}, 0
            while found.get(begin):
                self._parts[begin] = found[begin]
                begin += found[begin]
        return self._parts

    def _part(self, begin: int) -> epath.Path:
        return (
            self.path / f"{begin:012d}"
        )  # zero-padded, so that `cat` of the parts in order of names gives the log


def _file_system() -> Any:
    """Returns the gcsfs instance of epath and orbax, with no listings cache: other processes write too."""
    import fsspec
    import fsspec.config

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs", finalize_on_close=True)


def _read(files: Any, path: epath.Path) -> bytes | None:
    with _explained(path):
        try:
            return files.cat_file(os.fspath(path))
        except FileNotFoundError:
            return None


def _write(files: Any, path: epath.Path, content: bytes) -> None:
    with _explained(path):
        files.pipe_file(os.fspath(path), content)


def _remove(files: Any, path: epath.Path) -> None:
    with _explained(path), contextlib.suppress(FileNotFoundError):
        files.rm(os.fspath(path), recursive=True)


def _sizes(files: Any, path: epath.Path) -> dict[str, int]:
    """Returns name -> size in bytes of the direct children of a folder, sorted by name."""
    with _explained(path):
        try:
            found = files.ls(os.fspath(path), detail=True)
        except FileNotFoundError:
            return {}
    folder = os.fspath(path).removeprefix("gs://") + "/"
    sizes = {each["name"].removeprefix(folder).rstrip("/"): int(each["size"]) for each in found}
    return {name: sizes[name] for name in sorted(sizes) if name and "/" not in name}


@contextlib.contextmanager
def _explained(path: epath.Path) -> Iterator[None]:
    """Raises errors of the storage service as OSError, with what to check."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).strip()}"
        raise OSError(
            f"{path}: {said}. Check that the bucket exists and that this machine's account may read and "
            "write it (gcloud auth application-default login)"
        ) from error
