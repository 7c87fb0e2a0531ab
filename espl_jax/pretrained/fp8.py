"""Checkpoints in block-scaled FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), the format of DeepSeek-V3.

A matrix is stored as `float8_e4m3fn` with one scale for each block of, usually, 128 x 128 elements, in a
second tensor `NAME_scale_inv`. An element is its stored value times the scale of its block. Blocks at the end
of a row or column may be smaller. Biases, norms and whatever else has no scale are stored as usual.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from espl_jax.pretrained.safetensors_files import DTYPES, FP8, StoredTensor
from espl_jax.storage import json_values

_SCALE = "_scale_inv"
_VALUES = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
"""float32 [256], the value of every byte."""


def block_of(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the rows and columns of a block, from a parsed config.json; None if it has no FP8.

    Raises:
      ValueError: for quantization that cannot be read: other than FP8, and the MXFP4 of gpt-oss.
    """
    quantization = _object(fields, "quantization_config") or _object(
        _object(fields, "text_config"), "quantization_config"
    )
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if not quantization or (fields.get("model_type"), method) == ("gpt_oss", "mxfp4"):
        return None
    if method != "fp8" or quantization.get("fmt", "e4m3") != "e4m3":
        raise ValueError(
            f"quantization_config.quant_method={method!r} is not supported, only fp8 in the format e4m3, and "
            "mxfp4 of gpt_oss; use the unquantized model, or a .gguf file"
        )
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(x, int) and x > 0 for x in block):
        raise ValueError(
            f"quantization_config.weight_block_size={block!r} is not supported, only the rows and columns of "
            "a block, such as [128, 128]; use the unquantized model"
        )
    return block[0], block[1]


def _object(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a field that is a JSON object, {} if it is missing or empty."""
    value = fields.get(name) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r}: must be a JSON object; use config.json of the original model")
    return value


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A matrix in FP8 with its scales; a `Stored`.

    Attributes:
      stored: its elements, [rows, columns].
      scales: [ceil(rows / block rows), ceil(columns / block columns)].
      block: rows and columns of a block.
    """

    stored: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    @property
    def dtype(self) -> str:
        """Dtype of the scaled elements."""
        return "F32"

    @property
    def path(self) -> Path:
        """The file of the elements."""
        return self.stored.path

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.stored.shape

    def view(self) -> np.ndarray:
        """Returns the matrix in float32, as transformers computes it: the product, not rounded."""
        out = _VALUES[np.memmap(self.path, np.uint8, "r", self.stored.offset, self.shape)]
        rows, columns = self.block
        for scales, first in zip(
            self.scales.view().astype(np.float32), range(0, len(out), rows), strict=True
        ):
            out[first : first + rows] *= np.repeat(scales, columns)[: out.shape[1]]
        return out


def scaled(tensors: Mapping[str, StoredTensor], folder: Path) -> Mapping[str, StoredTensor | Scaled]:
    """Joins matrices in FP8 with their scales; other tensors are returned as they are.

    Args:
      tensors: those of a checkpoint, by name.
      folder: its folder, whose config.json has the size of a block.

    Raises:
      ValueError: if scales are missing, or of another shape or dtype.
    """
    stored = [name for name, tensor in tensors.items() if tensor.dtype == FP8]
    if not stored:
        return tensors
    block = block_of(json_values.parse((folder / "config.json").read_text(encoding="utf-8")))
    if block is None:
        raise ValueError(f"{folder}: {stored[0]} is FP8, but config.json has no quantization_config; add it")
    scales = {name + _SCALE for name in stored}
    joined: dict[str, StoredTensor | Scaled] = {name: x for name, x in tensors.items() if name not in scales}
    for name in stored:
        joined[name] = _with_scales(name, tensors[name], tensors.get(name + _SCALE), block)
    return joined


def _with_scales(
    name: str, stored: StoredTensor, scales: StoredTensor | None, block: tuple[int, int]
) -> Scaled:
    if scales is None:
        raise ValueError(f"{stored.path}: {name} is FP8 without {name}{_SCALE}; download the model again")
    wanted = tuple(-(-size // part) for size, part in zip(stored.shape, block, strict=False))
    if len(stored.shape) != 2 or scales.shape != wanted or scales.dtype not in DTYPES:
        raise ValueError(
            f"{stored.path}: {name} is {list(stored.shape)} in blocks of {list(block)}, but {name}{_SCALE} "
            f"is {list(scales.shape)} in {scales.dtype}; use files of the same model"
        )
    return Scaled(stored, scales, block)
