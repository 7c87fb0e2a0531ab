"""Checkpoints of gpt-oss, whose tensors hold all experts of a layer, as one tensor per expert and back.

| tensor in files | shape | parts of an expert |
| --- | --- | --- |
| `mlp.experts.gate_up_proj` | [E, D, 2F] | even columns are `gate`, odd ones `up` |
| `mlp.experts.gate_up_proj_bias` | [E, 2F] | the same |
| `mlp.experts.down_proj` | [E, F, D] | |
| `mlp.experts.down_proj_bias` | [E, D] | |

Instead of a matrix there may be its MXFP4, with outputs first: `gate_up_proj_blocks` [E, 2F, D / 32, 16] and
`gate_up_proj_scales` [E, 2F, D / 32], both uint8.

Parts have the names and layouts that other families use in files: `mlp.experts.7.gate_proj.weight` [F, D],
`mlp.experts.7.gate_proj.bias` [F]. They are views, so that a part is read only where it is needed.

Shape letters: E experts, D model width, F width of an expert.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from espl_jax.pretrained.mxfp4 import BLOCK, Mxfp4
from espl_jax.pretrained.safetensors_files import PartOf, Stored, StoredTensor
from espl_jax.pretrained.shards import Tensor

_PARTS = {
    "gate_up_proj": {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)},
    "down_proj": {"down_proj": slice(None)},
}
"""Matrix in files -> part of an expert -> the outputs that belong to it."""

_IN_FILES = {part: (name, outputs) for name, parts in _PARTS.items() for part, outputs in parts.items()}

_FUSED = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<matrix>gate_up_proj|down_proj)(?P<kind>|_bias|_blocks|_scales)"
)
_PART = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>\w+_proj)\.(?P<leaf>weight|bias)")


@dataclasses.dataclass(frozen=True)
class OfExpert(PartOf):
    """A part of a tensor that holds all experts; a `Stored`.

    Attributes:
      whole: the tensor.
      expert: number of the expert.
      outputs: the outputs that belong to the part.
    """

    expert: int
    outputs: slice

    @property
    def shape(self) -> tuple[int, ...]:
        *inputs, outputs = self.whole.shape[1:]
        return (len(range(outputs)[self.outputs]), *inputs)

    def view(self) -> np.ndarray:
        """Returns the part, outputs first, as a view of the memory-mapped tensor."""
        return self.whole.view()[self.expert, ..., self.outputs].T


@dataclasses.dataclass(frozen=True)
class Mxfp4OfExpert:
    """A part of a matrix in MXFP4; a `Stored`.

    Attributes:
      blocks, scales: the tensors of all experts.
      expert: number of the expert.
      outputs: the outputs that belong to the part.
    """

    blocks: StoredTensor
    scales: StoredTensor
    expert: int
    outputs: slice
    dtype: str = "F32"

    @property
    def path(self) -> Path:
        return self.blocks.path

    @property
    def shape(self) -> tuple[int, ...]:
        _, outputs, groups, _ = self.blocks.shape
        return len(range(outputs)[self.outputs]), groups * BLOCK

    def view(self) -> Mxfp4:
        """Returns the part, outputs first, as views of the memory-mapped tensors."""
        return Mxfp4(*(each.view()[self.expert, self.outputs] for each in (self.blocks, self.scales)))


def split(tensors: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    """Replaces the tensors of all experts by their parts; other tensors stay as they are.

    Raises:
      ValueError: if blocks and scales of MXFP4 do not have matching shapes, or are not bytes.
    """
    parts: dict[str, Stored] = {}
    for name, whole in tensors.items():
        found = _FUSED.fullmatch(name)
        if found is None or not whole.shape:
            parts[name] = whole
            continue
        kind, matrix = found["kind"], f"{found['experts']}.{found['matrix']}"
        blocks, scales = (tensors.get(f"{matrix}_{of_mxfp4}") for of_mxfp4 in ("blocks", "scales"))
        for part, outputs in _PARTS[found["matrix"]].items():
            for number in range(whole.shape[0]):
                place = f"{found['experts']}.{number}.{part}.{'bias' if kind == '_bias' else 'weight'}"
                if kind not in ("_blocks", "_scales"):
                    parts[place] = OfExpert(whole, number, outputs)
                elif blocks is None or scales is None:
                    parts[name] = whole
                elif kind == "_blocks":
                    _check(name, blocks, scales)
                    parts[place] = Mxfp4OfExpert(blocks, scales, number, outputs)
    return parts


def _check(name: str, blocks: StoredTensor, scales: StoredTensor) -> None:
    for found, shape in ((scales, scales.shape), (blocks, (*scales.shape, BLOCK // 2))):
        if found.dtype != "U8" or found.shape != shape or len(scales.shape) != 3:
            raise ValueError(
                f"{found.path}: {name} and its scales are {blocks.dtype} {list(blocks.shape)} and "
                f"{scales.dtype} {list(scales.shape)}, but MXFP4 needs U8, and {BLOCK // 2} bytes for each "
                "scale; download the model again"
            )


def in_files(name: str) -> str:
    """Returns the name of the tensor in files that holds a part; other names are returned unchanged."""
    found = _PART.fullmatch(name)
    if found is None or found["part"] not in _IN_FILES:
        return name
    matrix, _ = _IN_FILES[found["part"]]
    return f"{found['experts']}.{matrix}{'_bias' if found['leaf'] == 'bias' else ''}"


def join(tensors: Sequence[Tensor], dtype: str) -> list[Tensor]:
    """Inverts `split` for tensors to write, without MXFP4: joins the parts of all experts of a layer.

    Args:
      tensors: tensors to write; all parts of a layer are among them.
      dtype: dtype in which they are written. The values of one layer are held in it, and those of one part
        as its `read` returns them.
    """
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(in_files(tensor.name), []).append(tensor)
    return [
        group[0] if group[0].name == name else _joined(name, group, dtype) for name, group in groups.items()
    ]


def _joined(name: str, parts: Sequence[Tensor], dtype: str) -> Tensor:
    places = []
    for tensor in parts:
        found = _PART.fullmatch(tensor.name)
        assert found is not None
        places.append((int(found["number"]), _IN_FILES[found["part"]][1]))
    count = 1 + max(number for number, _ in places)
    outputs, *inputs = parts[0].shape
    shape = (count, *inputs, outputs * len(parts) // count)

    def read() -> np.ndarray:
        out = np.empty(shape, jnp.dtype(dtype))
        for tensor, (number, columns) in zip(parts, places, strict=True):
            out[number, ..., columns] = tensor.read().T
        return out

    return Tensor(name, shape, read)
