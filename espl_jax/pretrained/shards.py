"""Writes safetensors files one tensor at a time, so that at most one tensor is copied in memory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from espl_jax.pretrained.safetensors_files import INDEX, SINGLE

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""Dtypes that can be written -> their names in the format."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor to write.

    Attributes:
      name: name in the file.
      shape: shape in the file.
      read: returns its values as numpy, in any dtype; called once, when the tensor is written.
      dtype: dtype in the file, whatever that of the others; empty for theirs.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str = ""

    def size(self, dtype: str) -> int:
        """Returns its size in the file, in bytes, if `dtype` is that of the other tensors."""
        return math.prod(self.shape) * jnp.dtype(self.dtype or dtype).itemsize


def write_shards(folder: Path, tensors: Sequence[Tensor], dtype: str, max_shard_bytes: float) -> None:
    """Writes `model.safetensors`, or numbered shards with an index, in the format of transformers.

    Args:
      folder: output folder.
      tensors: tensors, in the order in which they are written.
      dtype: dtype of the tensors that do not name one, `float32` or `bfloat16`.
      max_shard_bytes: maximum bytes of tensors per file; a larger tensor gets a separate file.
    """
    shards: list[list[Tensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.size(dtype) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size(dtype)
    if len(shards) == 1:
        write_file(folder / SINGLE, tensors, dtype)
        return
    places = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, dtype)
        places |= {tensor.name: file for tensor in shard}
    total = sum(tensor.size(dtype) for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Sequence[Tensor], dtype: str) -> None:
    """Writes one safetensors file: the header's length, the header, and the tensors' bytes in order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size(dtype)
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype or dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data, since readers memory-map the file
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.read(), jnp.dtype(tensor.dtype or dtype))
            if values.shape != tensor.shape:
                raise ValueError(f"{tensor.name} is {list(values.shape)}, declared as {list(tensor.shape)}")
            file.write(values.reshape(-1).view(np.uint8).data)
