"""Converts records (JSON-like dicts) to problems."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from espl_jax.data.problems import ProblemSet
from espl_jax.data.statements import GSM8K_MARK, final_answer, without_instruction
from espl_jax.storage import json_values
from espl_jax.types import Problem

CANDIDATES = {"text": ("problem", "question"), "answer": ("answer",), "id": ("id",)}
"""Field of a Problem -> default field names in a record."""

_MOST_DIGITS = 640
"""Maximum digits of a number: the smallest limit of conversion that Python can be set to."""

_EXACT_FLOAT = 2**53
"""From this magnitude on, floats do not represent all integers exactly."""

REPEATS = ("refuse", "merge", "first")
"""How to treat repeated statements of a source; see `read_problems`."""


def read_problems(
    records: Iterable[tuple[str, Mapping[str, Any]]],
    source: str,
    fields: Mapping[str, str] | None = None,
    repeats: str = "refuse",
    prefix: str = "",
) -> ProblemSet:
    """Converts each record to a problem.

    DAPO's instruction is removed from statements, and GSM8K's worked solution from answers (`statements`). In
    a list of answers, the first is the answer and the others are its aliases. Numbers become text, 42.0 as
    42. A problem without an id gets a hash of its statement. A numeric id gets the prefix, since ids of other
    sources may also count from 1.

    Args:
      records: pairs of a place, such as "line 3", and a record.
      source: name of the source, for messages.
      fields: field names of `text`, `answer` and `id` that differ from CANDIDATES. Dots reach into dicts and
        lists: `prompt.0.content`. An empty name for `id` ignores the ids of the source.
      repeats: treatment of repeated statements. `refuse`: always an error; `merge`: an error only if the
        answers differ; `first`: never an error. Otherwise the first one is kept.
      prefix: prefix of numeric ids; the source by default.

    Raises:
      ValueError: with source, place and field, for missing, invalid or repeated data, and for a source
        without records.
    """
    if repeats not in REPEATS:
        raise ValueError(f"{source}: unknown repeats={repeats!r}; choose one of {', '.join(REPEATS)}")
    names = candidates(fields)
    statements: dict[str, tuple[str, Problem]] = {}
    ids: dict[str, str] = {}
    for place, record in records:
        problem = _problem(record, f"{source}, {place}", names, prefix or source)
        if problem.text in statements:
            _check_repeat(problem, f"{source}, {place}", *statements[problem.text], repeats)
            continue
        if problem.id in ids:
            raise ValueError(
                f"{source}, {place}: same id as in {ids[problem.id]} (id {problem.id!r}); make ids "
                "unique, or give the option id= with an empty name to use hashes of the statements"
            )
        statements[problem.text], ids[problem.id] = (place, problem), place
    if not statements:
        raise ValueError(f"{source} is empty; give at least one record")
    return ProblemSet(tuple(problem for _, problem in statements.values()), source)


def candidates(fields: Mapping[str, str] | None) -> dict[str, tuple[str, ...]]:
    """Returns field of a Problem -> field names of a record; the first name that a record has is used.

    Raises:
      ValueError: for a field that Problem does not have, or an empty name for `text` or `answer`.
    """
    if unknown := set(fields or {}) - set(CANDIDATES):
        raise ValueError(
            f"fields={sorted(unknown)}: unknown fields of a problem; choose from {list(CANDIDATES)}"
        )
    given = {name: (field,) if field else () for name, field in (fields or {}).items()}
    if empty := [name for name in ("text", "answer") if given.get(name) == ()]:
        raise ValueError(f"fields: empty name for {' and '.join(empty)}; give a name, or leave it out")
    return {**CANDIDATES, **given}


def is_required(name: str, fields: tuple[str, ...]) -> bool:
    """Returns whether a record must have the field; ids are required only under a name given by the user."""
    return name != "id" or fields not in ((), CANDIDATES["id"])


def missing(where: str, name: str, tried: Iterable[str], there: str) -> ValueError:
    """Returns the error for a missing field; `there` says what the record has instead."""
    wanted = " or ".join(repr(field) for field in tried)
    return ValueError(
        f"{where}: no field {wanted}; {there}; name the field that holds the {name} with the option "
        f"{name}=FIELD of this source, or with data.fields.{name} for all sources"
    )


def _check_repeat(problem: Problem, where: str, place: str, earlier: Problem, repeats: str) -> None:
    if repeats == "refuse":
        raise ValueError(
            f"{where}: same text as in {place} (id {earlier.id!r}); remove one, or give the option "
            "repeats=merge"
        )
    here, there = ({each.answer, *each.aliases} for each in (problem, earlier))
    if repeats == "merge" and here != there:
        raise ValueError(
            f"{where}: same text as in {place}, but a different answer, {problem.answer!r} instead of "
            f"{earlier.answer!r}; correct the data, or give the option repeats=first to keep the first"
        )


def _problem(
    record: Mapping[str, Any], where: str, names: Mapping[str, tuple[str, ...]], prefix: str
) -> Problem:
    values: dict[str, list[str]] = {}
    for name, fields in names.items():
        there = f"the fields are {sorted(record)}"
        for field in fields:
            try:
                value = _find(record, field)
            except LookupError as error:
                there = str(error)
                continue
            values[name] = _texts(value, f"{where}: the field {field!r}", several=name == "answer")
            break
        else:
            if is_required(name, fields):
                raise missing(where, name, fields, there)
    text = without_instruction(values["text"][0])
    if not text:
        raise ValueError(f"{where}: the text is an instruction without a statement; correct the data")
    answers = tuple(dict.fromkeys(map(final_answer, values["answer"])))
    if not all(answers):
        raise ValueError(f"{where}: the answer has nothing after {GSM8K_MARK}; correct the data")
    (identity,) = values.get("id") or [hashlib.sha256(text.encode()).hexdigest()[:12]]
    if "id" in values and identity.isdigit():
        identity = f"{prefix}-{identity}"
    return Problem(id=identity, text=text, answer=answers[0], aliases=answers[1:])


def _find(record: Mapping[str, Any], field: str) -> Any:
    """Returns the value of a field. Raises LookupError with the available fields where the path ends."""
    if field in record:
        return record[field]
    value: Any = record
    path: list[str] = []
    for step in field.split("."):
        if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, Mapping) and step in value:
            value = value[step]
        else:
            of = f" of {'.'.join(path)!r}" if path else ""
            if isinstance(value, Mapping):
                raise LookupError(f"the fields{of} are {sorted(value)}")
            size = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
            raise LookupError(f"the value{of} is {size}")
        path.append(step)
    return value


def _texts(value: Any, where: str, several: bool) -> list[str]:
    if several and isinstance(value, list) and value:
        return [_text(each, where) for each in value]
    return [_text(value, where)]


def _text(value: Any, where: str) -> str:
    while isinstance(value, list) and len(value) == 1:  # a loop, not recursion: lists may be nested deeply
        value = value[0]
    if isinstance(value, json_values.LongNumber):
        shown = reprlib.repr(value)
        raise ValueError(f"{where} is the number {shown}, which a float cannot hold exactly; give it as text")
    readable = isinstance(value, str | int | float | Decimal) and not isinstance(value, bool)
    if isinstance(value, float | Decimal):
        readable = Decimal(value).is_finite()  # math.isfinite treats a huge Decimal as infinite
    if not readable or (isinstance(value, str) and not value.strip()):
        shown = reprlib.repr(value)
        raise ValueError(f"{where} is {shown}; it must be non-blank text or a number")
    if isinstance(value, str):
        json_values.check_characters(value, where)
        return value.strip()
    if isinstance(value, float):
        if abs(value) >= _EXACT_FLOAT:
            raise ValueError(f"{where} is the float {value!r}, whose digits are not exact; give it as text")
        value = int(value) if value.is_integer() else value
    assert isinstance(value, int | float | Decimal)
    if abs(value) >= 10**_MOST_DIGITS:
        raise ValueError(f"{where} is a number of more than {_MOST_DIGITS} digits; give it as text")
    return str(value)
