"""From records, which are dicts as JSON has them, to problems."""

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
"""Fields of a Problem -> where they are looked for."""

_MOST_DIGITS = 640
"""Digits of a number, as many as Python converts whatever its limit is set to."""

_EXACT_FLOAT = 2**53
"""From here on a float holds other digits than those that were written."""

REPEATS = ("refuse", "merge", "first")
"""What becomes of a statement that a source has twice, see `read_problems`."""


def read_problems(
    records: Iterable[tuple[str, Mapping[str, Any]]],
    source: str,
    fields: Mapping[str, str] | None = None,
    repeats: str = "refuse",
    prefix: str = "",
) -> ProblemSet:
    """Makes a problem of each record.

    Statements lose DAPO's instruction, answers GSM8K's solution (`statements`). Of a list of answers the
    first is the answer and the others are its aliases. A number counts as its text, 42.0 as 42. A problem
    without id gets it from a hash of its statement; an id that is only a number gets the prefix before it,
    since other sources count from 1 too.

    Args:
      records: where each is, such as "line 3", and the record.
      source: whence they come, for messages.
      fields: names of the fields for some of `text`, `answer` and `id`, where they are not the usual ones
        (CANDIDATES). A name with dots reaches into dicts and lists: `prompt.0.content`. An empty name of `id`
        leaves the ids of the source alone.
      repeats: `refuse` takes a statement that is there twice for an error, `merge` only if its answers
        differ, `first` never; the first of them is kept.
      prefix: see above; the source by default.

    Raises:
      ValueError: naming source, place and field, if something is missing, of the wrong kind, or there twice,
        and for a source without records.
    """
    if repeats not in REPEATS:
        raise ValueError(f"{source}: repeats={repeats!r} is not known; choose one of {', '.join(REPEATS)}")
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
                f"{source}, {place}: the same id as in {ids[problem.id]} (id {problem.id!r}); make ids "
                "distinct, or give the option id= (and no name) for ids from the statements"
            )
        statements[problem.text], ids[problem.id] = (place, problem), place
    if not statements:
        raise ValueError(f"{source} is empty; it needs one record a problem")
    return ProblemSet(tuple(problem for _, problem in statements.values()), source)


def candidates(fields: Mapping[str, str] | None) -> dict[str, tuple[str, ...]]:
    """Fields of a Problem -> names of fields of a record, the first of which that is there counts.

    Raises:
      ValueError: for a field that a problem does not have.
    """
    if unknown := set(fields or {}) - set(CANDIDATES):
        raise ValueError(
            f"fields={sorted(unknown)} are not those of a problem; choose from {list(CANDIDATES)}"
        )
    given = {name: (field,) if field else () for name, field in (fields or {}).items()}
    if empty := [name for name in ("text", "answer") if given.get(name) == ()]:
        raise ValueError(f"fields: {' and '.join(empty)} has an empty name; give one, or leave it out")
    return {**CANDIDATES, **given}


def is_required(name: str, fields: tuple[str, ...]) -> bool:
    """Whether a field of a problem has to be there: ids only where they were asked for by another name."""
    return name != "id" or fields not in ((), CANDIDATES["id"])


def missing(where: str, name: str, tried: Iterable[str], there: str) -> ValueError:
    """The error for a field of a problem that a record does not have; `there` says what it has instead."""
    wanted = " or ".join(repr(field) for field in tried)
    return ValueError(
        f"{where}: no field {wanted}; {there}; say which one holds the {name} by the option {name}=FIELD of "
        f"this source, or by data.fields.{name} for all sources"
    )


def _check_repeat(problem: Problem, where: str, place: str, earlier: Problem, repeats: str) -> None:
    if repeats == "refuse":
        raise ValueError(
            f"{where}: the same text as in {place} (id {earlier.id!r}); keep one, or give the option "
            "repeats=merge"
        )
    here, there = ({each.answer, *each.aliases} for each in (problem, earlier))
    if repeats == "merge" and here != there:
        raise ValueError(
            f"{where}: the same text as in {place} with another answer, {problem.answer!r} here and "
            f"{earlier.answer!r} there; correct the data, or give the option repeats=first to keep the first"
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
        raise ValueError(f"{where}: there is an instruction but no statement; correct the data")
    answers = tuple(dict.fromkeys(map(final_answer, values["answer"])))
    if not all(answers):
        raise ValueError(f"{where}: nothing follows {GSM8K_MARK} in the answer; correct the data")
    (identity,) = values.get("id") or [hashlib.sha256(text.encode()).hexdigest()[:12]]
    if "id" in values and identity.isdigit():
        identity = f"{prefix}-{identity}"
    return Problem(id=identity, text=text, answer=answers[0], aliases=answers[1:])


def _find(record: Mapping[str, Any], field: str) -> Any:
    """The value of a field; LookupError says which fields there are where the path ends early."""
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
    while isinstance(value, list) and len(value) == 1:  # a loop, since a file may nest them deeply
        value = value[0]
    if isinstance(value, json_values.LongNumber):
        shown = reprlib.repr(value)
        raise ValueError(f"{where} is the number {shown}, which a float cannot hold exactly; give it as text")
    readable = isinstance(value, str | int | float | Decimal) and not isinstance(value, bool)
    if isinstance(value, float | Decimal):
        readable = Decimal(value).is_finite()  # math.isfinite would take a huge Decimal for infinity
    if not readable or (isinstance(value, str) and not value.strip()):
        shown = reprlib.repr(value)
        raise ValueError(f"{where} is {shown}, but must be text that is not blank, or a number")
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
