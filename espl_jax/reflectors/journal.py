"""The replies of a server, each written to disk as it arrives: what has been paid for is not asked again.

One JSON object a line, for people to read as well: the key, what was asked, and what came of it. The file is
no log of an iteration: it is appended to for as long as a run lives and never cut back but for a torn line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from absl import logging

from espl_jax import durable


def digest(value: Any) -> str:
    """A hash of JSON values, the same in every process: SHA-256 of their text with sorted keys, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Journal:
    """An append-only file of entries, found by key. Used by one process at a time, by any of its threads.

    An entry that `add` has returned from survives a kill and a power cut. A last line that a kill tore is cut
    off on opening. Only the places of the entries are kept in memory.

    Args:
      path: the file; made if it is not there.

    Raises:
      ValueError: a damaged line, named, that no kill can have left.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        if is_new := not self.path.exists():
            self.path.touch()
        length = self._read_places()
        if torn := durable.size(self.path) - length:
            logging.warning("%s ends in %d bytes of an unfinished line: cut off", self.path, torn)
            durable.cut_back(self.path, length)
        # Unbuffered, so that what a failed write leaves is in the file, where it can be cut off.
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._end = length
        if is_new:
            durable.sync_folder(self.path.absolute().parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def find(self, key: str) -> dict[str, Any] | None:
        """The entry of that key, or None."""
        if key not in self._places:
            return None
        begin, length = self._places[key]
        return json.loads(os.pread(self._file.fileno(), length, begin))

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Writes an entry of plain JSON values through to the disk.

        Raises:
          OSError: the disk is full, or the file cannot be written. The file is then as it was before.
        """
        line = json.dumps({"key": key, **entry}, separators=(",", ":")).encode() + b"\n"
        with self._lock, durable.disk_full_explained(self.path):
            try:
                written = os.pwrite(self._file.fileno(), line, self._end)
                while written < len(line):
                    written += os.pwrite(self._file.fileno(), line[written:], self._end + written)
                os.fsync(self._file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._end)
                raise
            self._places[key] = (self._end, len(line))
            self._end += len(line)

    def _read_places(self) -> int:
        """Finds the entries, and returns the length of the file up to the end of its last whole line."""
        begin = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    key = json.loads(line)["key"]
                    if not isinstance(key, str):
                        raise TypeError("its key is no text")
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self.path}, line {number} is damaged ({type(error).__name__}: {error}): remove it "
                        f"with `sed -i {number}d {self.path}`, and the reply that it held is asked for again"
                    ) from error
                self._places[key] = (begin, len(line))
                begin += len(line)
        return begin
