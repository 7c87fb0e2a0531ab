"""Caches dequantized GGUF files on disk, because unpacking even a small file takes seconds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from espl_jax.models.config import DecoderConfig, config_from_dict
from espl_jax.pretrained.gguf.config import config_from_gguf
from espl_jax.pretrained.gguf.file import open_gguf
from espl_jax.pretrained.gguf.weights import Params, params_from_gguf
from espl_jax.storage.user_cache import cache_folder

FORMAT_VERSION = 3
"""Part of every file name; increase it when the params tree or the stored fields change."""

Unpacked = tuple[Params, DecoderConfig, dict[str, Any]]


def unpack(path: str | os.PathLike[str], **numerics: Any) -> Unpacked:
    """Reads a GGUF file: numpy params, config, and metadata (which includes the tokenizer).

    Args:
      path: path of the file.
      **numerics: DecoderConfig fields that are not in the file; params are in `param_dtype`, by default
        float32.
    """
    file = open_gguf(path)
    config = config_from_gguf(file, **numerics)
    return params_from_gguf(file, config), config, dict(file.metadata)


def unpack_cached(path: str | os.PathLike[str]) -> Unpacked:
    """Returns `unpack` in float32, cached under the hash of the file's content.

    The cache folder is `~/.cache/espl_jax`, or the environment variable ESPL_JAX_CACHE. Files are written
    atomically; an unreadable file is replaced. If the folder is not writable, the model is unpacked every
    time, with a warning.
    """
    with open(path, "rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    entry = cache_folder() / f"{Path(path).stem}-{digest[:16]}-v{FORMAT_VERSION}.safetensors"
    try:
        return _read(entry)
    except (FileNotFoundError, SafetensorError, KeyError, TypeError):
        unpacked = unpack(path)
    try:
        _write(entry, unpacked)
    except OSError as error:
        warnings.warn(
            f"the model could not be cached in {entry.parent} ({error}); "
            "set the environment variable ESPL_JAX_CACHE to a writable folder with enough space",
            stacklevel=2,
        )
    return unpacked


def _read(entry: Path) -> Unpacked:
    with safe_open(str(entry), framework="numpy") as file:
        fields = file.metadata()
        params: Params = {}
        for name in file.keys():  # noqa: SIM118 (not a dict)
            *parents, last = name.split(".")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = file.get_tensor(name)
    return params, config_from_dict(json.loads(fields["config"])), json.loads(fields["gguf"])


def _write(entry: Path, unpacked: Unpacked) -> None:
    params, config, metadata = unpacked
    fields = {"config": json.dumps(dataclasses.asdict(config)), "gguf": json.dumps(metadata)}
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".writing-") as folder:
        unfinished = os.path.join(folder, entry.name)
        save_file(_flatten(params), unfinished, metadata=fields)
        os.replace(unfinished, entry)


def _flatten(params: Params, prefix: str = "") -> dict[str, np.ndarray]:
    flat = {}
    for name, value in params.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
