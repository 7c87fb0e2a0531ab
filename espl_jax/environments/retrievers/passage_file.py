"""Passages in JSON lines, read one at a time from where they lie in the file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from espl_jax.environments.retrievers.base import RetrievalError
from espl_jax.storage import json_values
from espl_jax.types import Passage


class BlankPassageError(ValueError):
    """A record that would be a passage if it said something."""


class PassageFile:
    """The passages of an open file, by their number; only those asked for are in memory.

    Args:
      path: the file.
      offsets: int64 [passages + 1], where the line of each passage begins, in bytes, and the file's size.
    """

    def __init__(self, path: Path, offsets: Sequence[int] | np.ndarray):
        self._path, self._offsets = path, offsets
        self._file = open(path, "rb")  # noqa: SIM115 (open for as long as the passages are)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Passage:
        """Reads a passage; from any thread.

        Raises:
          RetrievalError: the file has changed since it was indexed.
        """
        start, stop = int(self._offsets[number]), int(self._offsets[number + 1])
        line = os.pread(self._file.fileno(), stop - start, start)
        try:
            return read_passage(_parse(line))
        except ValueError:
            raise RetrievalError(
                f"{self._path} has changed since it was indexed; start again, and it is indexed anew"
            ) from None


def scan(path: Path) -> Iterator[tuple[int, Passage]]:
    """Reads a file from its beginning: where each line begins, in bytes, and its passage. Skips blank lines.

    Raises:
      ValueError: naming file, line and field, for a line that holds no passage.
    """
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield offset, read_passage(_parse(line))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
            offset += len(line)


def read_passage(record: Any) -> Passage:
    """The passage in a record: `text` with a `title` or without, or `contents`.

    `contents` is what Search-R1's corpora and servers have: the title on the first line, mostly in quotation
    marks, and the text on the rest. It is read where there is no `text`. One line alone is text.

    Raises:
      BlankPassageError: if they are blank. ValueError: naming the field.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, but a passage must be one JSON object")
    if record.get("text") is not None:
        title = record.get("title")
        passage = Passage("" if title is None else _string(title, "title"), _string(record["text"], "text"))
    elif record.get("contents") is not None:
        first, newline, rest = _string(record["contents"], "contents").partition("\n")
        passage = Passage(first.strip().strip('"').strip(), rest.strip()) if newline else Passage("", first)
    else:
        raise ValueError(
            f"no field 'text' or 'contents'; the fields are {sorted(record)}; name the passage's one so"
        )
    if not passage.title and not passage.text:
        raise BlankPassageError("the passage is blank; leave it out")
    return passage


def _parse(line: bytes) -> Any:
    try:
        return json_values.parse(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error}); convert the file") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); each line must be one JSON object") from None


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the field {field!r} is {value!r:.100}, but must be text")
    # JSON can hold half a surrogate pair, which no file and no further request can.
    return value.encode(errors="replace").decode().strip()
