"""Problem sets in JSON lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espl_jax.data.problems import ProblemSet
from espl_jax.types import Problem

CANDIDATES = {"text": ("problem", "question"), "answer": ("answer",), "id": ("id",)}
"""Fields of a Problem -> where they are looked for."""

GSM8K_MARK = "####"
"""GSM8K writes the worked solution, this mark, and the number."""


def read_jsonl(path: str | Path, fields: Mapping[str, str] | None = None) -> ProblemSet:
    """Reads one problem a line; blank lines are skipped.

    Args:
      path: the file.
      fields: names for some of `text`, `answer` and `id` in this file, where they are not the usual ones
        (`problem` or `question`, `answer`, `id`). A file without ids gets them from a hash of the text; an id
        that is only a number gets the file's name before it, since other files count from 1 too.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming file, line and field, if something is missing, of the wrong kind, or there twice.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {path}; correct the path")
    if unknown := set(fields or {}) - set(CANDIDATES):
        raise ValueError(
            f"fields={sorted(unknown)} are not those of a problem; choose from {list(CANDIDATES)}"
        )
    candidates = {**CANDIDATES, **{name: (field,) for name, field in (fields or {}).items()}}
    problems: dict[str, Problem] = {}
    lines: dict[str, int] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it") from error
    # Not splitlines, which also splits at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        problem = _problem(line, where, path.stem, candidates, id_required="id" in (fields or {}))
        if problem.id in problems:
            same = "text" if problem.text == problems[problem.id].text else "id"
            raise ValueError(
                f"{where}: the same {same} as in line {lines[problem.id]} (id {problem.id!r}); keep one"
            )
        problems[problem.id], lines[problem.id] = problem, number
    if not problems:
        raise ValueError(f"{path} is empty; it needs one JSON object a line")
    return ProblemSet(tuple(problems.values()), path.name)


def _problem(
    line: str, where: str, file: str, candidates: Mapping[str, tuple[str, ...]], id_required: bool
) -> Problem:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a {type(record).__name__}, but each line must be one JSON object")

    def field(name: str) -> str | None:
        for key in candidates[name]:
            if key in record:
                return _text(record[key], f"{where}: the field {key!r}")
        return None

    values = {name: field(name) for name in candidates}
    for name in ("text", "answer", *(("id",) if id_required else ())):
        if values[name] is None:
            wanted = " or ".join(repr(key) for key in candidates[name])
            raise ValueError(
                f"{where}: no field {wanted}; the fields are {sorted(record)}; "
                f"say which one holds the {name} by fields={{'{name}': ...}}"
            )
    answer = values["answer"].rpartition(GSM8K_MARK)[2].strip()
    if not answer:
        raise ValueError(f"{where}: nothing follows {GSM8K_MARK} in the answer; correct the data")
    identity = values["id"] or hashlib.sha256(values["text"].encode()).hexdigest()[:12]
    if values["id"] and identity.isdigit():
        identity = f"{file}-{identity}"
    return Problem(id=identity, text=values["text"], answer=answer)


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"{where} is {value!r}, but must be text that is not blank, or a number")
    return str(value).strip()
