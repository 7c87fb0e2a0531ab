"""Problem sets in JSON Lines files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from espl_jax.data.problems import ProblemSet
from espl_jax.data.records import read_problems
from espl_jax.storage import json_values


def read_jsonl(
    path: str | Path, fields: Mapping[str, str] | None = None, repeats: str = "refuse"
) -> ProblemSet:
    """Reads one problem per line; blank lines are skipped.

    Args:
      path: the file.
      fields, repeats: as for `read_problems`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: with file, line and field, for missing, invalid or repeated data.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} does not exist; correct the path")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error}); convert the file") from error
    read = read_problems(_records(text, path), str(path), fields, repeats, prefix=path.stem)
    return dataclasses.replace(read, name=path.name)


def _records(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines, which also splits at characters that are valid inside JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json_values.parse(line, keep_digits=True)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a {type(record).__name__}; each line must be one JSON object")
        yield f"line {number}", record
