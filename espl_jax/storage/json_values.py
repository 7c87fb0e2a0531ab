"""JSON values that round-trip exactly, and differences between configurations."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

_LONGEST_INT = sys.int_info.str_digits_check_threshold
"""Digits that Python always converts, whatever sys.set_int_max_str_digits is."""


def plain(value: Any, where: str) -> Any:
    """Returns `value` as JSON values that round-trip exactly; numpy and jax values become numbers and lists.

    Args:
      value: dicts with string keys, lists, tuples, strings, numbers, booleans, None, arrays.
      where: name of the value in error messages.

    Raises:
      ValueError: for a NaN or infinity. TypeError: for other values that JSON lacks. Both name the field.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not np.isfinite(value):
            raise ValueError(
                f"{where} is {value}, which is not finite; find out where it comes from before you resume"
            )
        return float(value)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}, but JSON keys are strings; use {str(key)!r}")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist(), where)
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON does not support; convert it first")


@dataclasses.dataclass(frozen=True, repr=False)
class LongNumber:
    """A number as written that a float cannot represent: too many digits, or an exponent out of range."""

    written: str

    def __repr__(self) -> str:
        return self.written


def parse(text: str | bytes, keep_digits: bool = False) -> Any:
    """Parses JSON; integers with more digits than Python converts become Decimals.

    Args:
      text: the JSON text.
      keep_digits: return a LongNumber for a number that a float cannot represent exactly.

    Raises:
      ValueError: if the text is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text, parse_int=_whole_number, parse_float=_float if keep_digits else None)
    except RecursionError as error:
        raise ValueError("nested too deeply to be read") from error


def check_characters(text: str, where: str) -> None:
    """Rejects lone surrogates, which JSON can hold but tokenizers and UTF-8 files cannot.

    Raises:
      ValueError: with `where` and the position of the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has {text[error.start]!r} at character {error.start + 1}, half of a surrogate pair; "
            "write the intended character, or remove it"
        ) from error


def _whole_number(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= _LONGEST_INT else Decimal(digits)


def _float(written: str) -> float | LongNumber:
    value = float(written)
    try:
        return value if Decimal(repr(value)) == Decimal(written) else LongNumber(written)
    except InvalidOperation:  # an exponent that is out of range even for Decimal
        return LongNumber(written)


def differences(old: dict[str, Any], new: dict[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """Returns the differences between two configurations, one line per field: dotted name and both values.

    Args:
      old, new: nested dicts of plain values.
      may_change: dotted names of fields, or groups of fields, to ignore.
    """
    before, now = _fields(old), _fields(new)
    return [
        f"  {field}: {before.get(field, '(absent)')} saved, {now.get(field, '(absent)')} now"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
        and not any(field == free or field.startswith(f"{free}.") for free in may_change)
    ]


def _fields(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns dotted name -> value as JSON text."""
    fields = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            fields |= _fields(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = json.dumps(value)
    return fields
