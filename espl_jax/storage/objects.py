"""A folder of a bucket: objects are written whole or not at all, and what is appended becomes one more.

No renames, no appends and no locks: a name holds its old content or its new one, and that is all there is to
build on. A log is a folder of parts, each named by the place of its first byte in the log; parts that join
without a gap from 0 on are the log.
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
_AT_ONCE = 16  # parts that are read side by side


class ObjectFolder:
    """The objects whose names begin with `path`; names are relative to it and may have slashes.

    Attributes:
      path: the folder, with its `gs://`.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self._files = _file_system()
        self._holder = b""

    def hold(self) -> None:
        """Takes the folder from whoever had it: nobody can tell a dead process from a slow one.

        The one that had it is refused at its next write (`check_held`). Between that check and the write
        there is an instant in which both could write: two runs must not be started in one folder.
        """
        before = self.read(_HOLDER)
        if before:
            logging.warning("%s was held by process %s: taken over", self.path, before.decode())
        holder = f"{os.getpid()} on {socket.gethostname()} ({uuid.uuid4().hex[:8]})".encode()
        self.write(_HOLDER, holder)
        self._holder = holder

    def check_held(self) -> None:
        """Raises RuntimeError if another process has taken the folder since `hold`."""
        found = self.read(_HOLDER) or b""
        if found != self._holder:
            raise RuntimeError(
                f"{self.path} has been taken over by process {found.decode() or 'unknown'}; this is process "
                f"{self._holder.decode()}: stop the other one, or give this run another --workdir"
            )

    def release(self) -> None:
        """Gives the folder up, if it has not been taken over."""
        if self._holder and self.read(_HOLDER) == self._holder:
            self.remove(_HOLDER)
        self._holder = b""

    def read(self, name: str) -> bytes | None:
        """The content of an object, or None."""
        return _read(self._files, self.path / name)

    def write(self, name: str, content: bytes) -> None:
        """Writes an object: readers see the old content or the new one."""
        if self._holder:
            self.check_held()
        _write(self._files, self.path / name, content)

    def names(self, name: str) -> list[str]:
        """What a folder in this one holds; empty where there is none."""
        return sorted(_sizes(self._files, self.path / name))

    def make(self, name: str) -> None:
        """Nothing to do: a folder is there as soon as an object is in it."""

    def remove(self, name: str) -> None:
        """Removes an object, or all that is in a folder."""
        if self._holder:
            self.check_held()
        _remove(self._files, self.path / name)

    def log(self, name: str) -> ObjectLog:
        """The log in the folder of that name; written to only while this folder is held."""
        return ObjectLog(self.path / name, self.check_held)


class ObjectLog:
    """A log in parts, written by one process.

    Attributes:
      path: the folder of its parts.
    """

    def __init__(self, path: epath.Path, check_held: Callable[[], None] = lambda: None):
        self.path = path
        self._check_held = check_held
        self._files = _file_system()
        self._parts: dict[int, int] | None = None
        self._tail = bytearray()

    def length(self) -> int:
        """Bytes in it, with those that are not written yet."""
        return self._end() + len(self._tail)

    def append(self, content: bytes) -> None:
        """Adds bytes, which others can read after the next `sync`."""
        self._tail += content

    def sync(self) -> None:
        """Writes what was appended since the last time as one more object.

        Raises:
          OSError: it cannot be written. All of it is kept for the next time.
        """
        if self._tail:
            self._check_held()
            begin = self._end()
            _write(self._files, self._part(begin), bytes(self._tail))
            self._listed()[begin] = len(self._tail)
            self._tail.clear()

    def read(self, begin: int, length: int) -> bytes:
        """Those bytes of it."""
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
        """Every line with its newline; the last may lack it."""
        parts = self._listed()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            contents = pool.map(lambda begin: _read(self._files, self._part(begin)) or b"", parts)
            yield from io.BytesIO(b"".join([*contents, self._tail]))

    def cut_back(self, length: int) -> None:
        """Drops what it holds beyond `length` bytes, and parts that join to nothing.

        Raises:
          ValueError: it is shorter than that.
        """
        end = self._end()
        if self.length() < length:
            raise ValueError(
                f"{self.path} has {self.length()} bytes, but its checkpoint counts {length}: put the whole "
                "folder back, or use another --workdir"
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
        """Writes what is not written yet."""
        self.sync()

    def _end(self) -> int:
        """Where the parts end."""
        parts = self._listed()
        last = max(parts, default=0)
        return last + parts.get(last, 0)

    def _listed(self) -> dict[int, int]:
        """The parts; lists them the first time."""
        if self._parts is None:
            sizes = _sizes(self._files, self.path)
            found = {int(name): size for name, size in sizes.items() if name.isdigit()}
            self._parts, begin = {}, 0
            while found.get(begin):
                self._parts[begin] = found[begin]
                begin += found[begin]
        return self._parts

    def _part(self, begin: int) -> epath.Path:
        return self.path / f"{begin:012d}"  # in the order of the names, so that `cat` gives the log


def _file_system() -> Any:
    """gcsfs as epath, and so orbax, has it, but without its memory of listings: other processes write too."""
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
    """Name -> bytes of what a folder holds directly, in the order of names."""
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
    """Errors of the service as OSError that says what to look at."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).strip()}"
        raise OSError(
            f"{path}: {said}. Check that the bucket is there and that this machine's account may read and "
            "write it (gcloud auth application-default login)"
        ) from error
