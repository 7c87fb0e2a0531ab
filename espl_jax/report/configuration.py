"""The configuration of a run, its difference from the defaults, and the command that resumes it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from espl_jax.report.read import RunLogs
from espl_jax.storage.json_values import plain

ABSENT = "absent"
"""Shown for a field that a configuration does not have."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a configuration.

    Attributes:
      name: dotted name.
      value, default: as JSON text, or `ABSENT`.
    """

    name: str
    value: str
    default: str

    @property
    def differs(self) -> bool:
        """Whether the value is not the default."""
        return self.value != self.default


def fields_of(config: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> list[Field]:
    """Returns all fields of a configuration, by name. Without defaults, no field differs."""
    values = flat(config)
    others = values if defaults is None else flat(defaults)
    names = sorted(values.keys() | others.keys())
    return [Field(name, values.get(name, ABSENT), others.get(name, ABSENT)) for name in names]


def find_defaults() -> dict[str, Any] | None:
    """Returns the defaults of configs/common.py as plain values; None if it is not installed."""
    for name in ("espl_jax.configs.common", "configs.common"):
        try:
            return plain(importlib.import_module(name).get_config().to_dict(), "config")
        except (ImportError, AttributeError):
            continue
    return None


def resume_command(run: RunLogs, fields: Sequence[Field]) -> str:
    """Returns a command that resumes the run: the defaults, and a flag for each field that differs."""
    flags = [
        shlex.quote(f"--config.{each.name}={_flag_value(each.value)}")
        for each in fields
        if each.differs and each.value not in (ABSENT, "null")
    ]
    words = [
        "python -m espl_jax.main --config=configs/common.py",
        f"--workdir={shlex.quote(str(run.path))}",
        *flags,
    ]
    return " \\\n    ".join(words)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns dotted name -> value as JSON text."""
    fields: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False)
    return fields


def _flag_value(value: str) -> str:
    """Returns a value as a flag takes it: strings as they are, lists as Python tuples."""
    parsed = json.loads(value)
    if isinstance(parsed, str):
        return parsed
    return repr(tuple(parsed)) if isinstance(parsed, list) else repr(parsed)
