"""Keeps credentials out of what trackers and the work directory get."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from espl_jax.trackers.base import Hyperparameter

_SECRET_NAME = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET|CREDENTIALS)$", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
_IN_JSON = re.compile(r"""("[^"]*(?:key|token|password|secret)"\s*:\s*)"[^"]*\"""", re.IGNORECASE)
_SHORTEST = 8


def redacted(text: str) -> str:
    """Replaces credentials by `***`.

    These are the user part of addresses, strings of JSON objects whose key ends like `api_key`, and the
    values of environment variables with such names.
    """
    text = _IN_JSON.sub(r'\1"***"', _IN_ADDRESS.sub("***@", text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Hyperparameter]:
    """Flattens a configuration to `group.field`, without credentials; None and tuples become text."""
    found: dict[str, Hyperparameter] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": leaf for inner, leaf in hyperparameters(value).items()}
        elif isinstance(value, bool | int | float):
            found[name] = value
        else:
            found[name] = redacted(str(list(value) if isinstance(value, tuple) else value))
    return found
