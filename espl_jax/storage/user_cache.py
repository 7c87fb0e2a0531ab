"""The folder for what can be had again: models, their unpacked weights, indexes."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns `~/.cache/espl_jax`, or what the environment variable ESPL_JAX_CACHE says."""
    return Path(os.environ.get("ESPL_JAX_CACHE") or Path.home() / ".cache" / "espl_jax").expanduser()
