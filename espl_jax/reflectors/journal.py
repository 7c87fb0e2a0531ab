"""The replies of a server, each written to disk as it arrives: what has been paid for is not asked again.

One JSON object a line, for people to read as well: the key, what was asked, and what came of it. The file is
no log of an iteration: it is appended to for as long as a run lives and never cut back but for a torn line.
In a bucket it is a folder with one object for each line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from typing import Any

from absl import logging

from espl_jax.storage import folders


def digest(value: Any) -> str:
    """A hash of JSON values, the same in every process: SHA-256 of their text with sorted keys, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Journal:
    """An append-only file of entries, found by key. Used by one process at a time, by any of its threads.

    An entry that `add` has returned from survives a kill and a power cut. A last line that a kill tore is cut
    off on opening. Only the places of the entries are kept in memory.

    Args:
      path: the file, or the folder in a bucket (`gs://`); made if it is not there.

    Raises:
      ValueError: a damaged line, named, that no kill can have left.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._log = folders.open_log(path)
        self.path = self._log.path
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        self._end = self._read_places()
        if torn := self._log.length() - self._end:
            logging.warning("%s ends in %d bytes of an unfinished line: cut off", self.path, torn)
            self._log.cut_back(self._end)
        self._log.append(b"")  # makes the file

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._log.close()

    def find(self, key: str) -> dict[str, Any] | None:
        """The entry of that key, or None."""
        if key not in self._places:
            return None
        with self._lock:
            return json.loads(self._log.read(*self._places[key]))

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Writes an entry of plain JSON values through to the disk.

        Raises:
          OSError: the disk is full, or the file cannot be written. The file is then as it was before.
        """
        line = json.dumps({"key": key, **entry}, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                self._log.append(line)
                self._log.sync()
            except BaseException:
                with contextlib.suppress(OSError):
                    self._log.cut_back(self._end)
                raise
            self._places[key] = (self._end, len(line))
            self._end += len(line)

    def _read_places(self) -> int:
        """Finds the entries, and returns the length of the file up to the end of its last whole line."""
        begin = 0
        for number, line in enumerate(self._log.lines(), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                key = json.loads(line)["key"]
                if not isinstance(key, str):
                    raise TypeError("its key is no text")
            except (ValueError, KeyError, TypeError) as error:
                remedy = (
                    f"move {self.path} away, and its replies are asked for again"
                    if folders.is_remote(self.path)
                    else f"remove it with `sed -i {number}d {self.path}`, and its reply is asked for again"
                )
                raise ValueError(
                    f"{self.path}, line {number} is damaged ({type(error).__name__}: {error}): {remedy}"
                ) from error
            self._places[key] = (begin, len(line))
            begin += len(line)
        return begin
