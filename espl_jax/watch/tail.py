"""Reads the lines that are added to a log of a run, which may be cut back when the run resumes."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from espl_jax.storage import folders

_CHUNK = 1 << 22


class Added(NamedTuple):
    """What is new in a log.

    Attributes:
      records: the new lines.
      again: whether the log has been cut back, so that these lines replace all that were read before.
    """

    records: list[dict[str, Any]]
    again: bool


class Tail:
    """Reads each line of a log once; a last line without its newline is read later.

    Args:
      workdir: the work directory.
      log: name of the log.
    """

    def __init__(self, workdir: str | os.PathLike[str], log: str):
        self._path = folders.parse(workdir) / f"{log}.jsonl"
        self._begin = 0
        self._last = b""

    def read(self) -> Added:
        """Returns the lines since the last call."""
        log = folders.open_log(self._path)
        length = log.length()
        # A log that was cut back and has grown again differs in the last line that was read.
        before = log.read(self._begin - len(self._last), len(self._last)) if self._last else b""
        kept = length >= self._begin and before == self._last
        again = bool(self._begin) and not kept
        begin, last = (0, b"") if again else (self._begin, self._last)
        records = []
        while begin < length:
            content = log.read(begin, min(_CHUNK, length - begin))
            whole = content[: content.rfind(b"\n") + 1]
            if not whole and len(content) < _CHUNK:
                break
            if not whole:  # a line longer than a chunk
                content = log.read(begin, length - begin)
                whole = content[: content.find(b"\n") + 1]
                if not whole:
                    break
            lines = whole.split(b"\n")[:-1]
            records += [json.loads(line) for line in lines]
            begin, last = begin + len(whole), lines[-1] + b"\n"
        self._begin, self._last = begin, last  # only now, so that an error loses no line
        return Added(records, again)
