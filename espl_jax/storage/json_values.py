"""JSON values that read back exactly, and how two configurations of them differ."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

_LONGEST_INT = sys.int_info.str_digits_check_threshold
"""Digits that Python converts whatever its limit is set to."""


def plain(value: Any, where: str) -> Any:
    """`value` as JSON values that read back exactly: numpy and jax values become numbers and lists.

    Args:
      value: dicts with string keys, lists, tuples, strings, numbers, booleans, None, arrays.
      where: what to call the value in an error.

    Raises:
      ValueError: a NaN or infinity. TypeError: anything else that JSON does not have. Both name the field.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not np.isfinite(value):
            raise ValueError(f"{where} is {value}: a run with such a number in it cannot be trusted; stopped")
        return float(value)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: JSON keys are strings, so use {str(key)!r}")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist(), where)
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON does not have: convert it first")


@dataclasses.dataclass(frozen=True, repr=False)
class LongNumber:
    """A number as it was written, of which a float would be another one: it has too many digits, or a power
    of ten that is too large or too small."""

    written: str

    def __repr__(self) -> str:
        return self.written


def parse(text: str | bytes, keep_digits: bool = False) -> Any:
    """What a JSON text holds; whole numbers of more digits than Python converts are Decimals.

    Args:
      text: the JSON.
      keep_digits: give a LongNumber for a number that a float would change.

    Raises:
      ValueError: for a text that is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text, parse_int=_whole_number, parse_float=_float if keep_digits else None)
    except RecursionError as error:
        raise ValueError("nested too deeply to be read") from error


def check_characters(text: str, where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can hold, and neither a tokenizer nor a file in UTF-8.

    Raises:
      ValueError: saying `where` and at which character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has {text[error.start]!r} at character {error.start + 1}, half of a surrogate pair; "
            "write the character that is meant, or leave it out"
        ) from error


def _whole_number(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= _LONGEST_INT else Decimal(digits)


def _float(written: str) -> float | LongNumber:
    value = float(written)
    try:
        return value if Decimal(repr(value)) == Decimal(written) else LongNumber(written)
    except InvalidOperation:  # a power of ten that not even a Decimal has
        return LongNumber(written)


def differences(old: dict[str, Any], new: dict[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """What differs between two configurations, a line a field: its dotted name and both values.

    Args:
      old, new: nested dicts of plain values.
      may_change: dotted names of fields, or of groups of fields, that are left out.
    """
    before, now = _fields(old), _fields(new)
    return [
        f"  {field}: {before.get(field, '(absent)')} there, {now.get(field, '(absent)')} now"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
        and not any(field == free or field.startswith(f"{free}.") for free in may_change)
    ]


def _fields(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted name -> value as JSON text."""
    fields = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            fields |= _fields(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = json.dumps(value)
    return fields
