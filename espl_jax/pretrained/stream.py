"""Loads weights from files onto devices, one shard at a time, so that the host never holds a whole model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espl_jax.models.params import Weight
from espl_jax.parallel import sharding
from espl_jax.pretrained.layout import from_file
from espl_jax.pretrained.mxfp4 import Mxfp4
from espl_jax.pretrained.safetensors_files import Stored

_TILE = 128


def load_weight(weight: Weight, stored: Sequence[Stored], mesh: Mesh | None) -> jax.Array:
    """Reads one weight onto its devices.

    Besides the memory-mapped files, the host holds one shard at a time, in the dtype of the weight, and at
    most one dequantized tensor in float32. Each process reads only the shards of its devices, and each shard
    once, even if several devices have it.

    Args:
      weight: declaration of the weight.
      stored: its tensor, or the tensors that are stacked into it, in the order of `hf_names.stacked`; of
        shape `layout.file_shape(weight)`.
      mesh: mesh over which it is sharded by the sampling rules of `parallel.sharding`; None for the default
        device.

    Returns:
      Array of `weight.shape` and `weight.dtype`; wider values are rounded to nearest.
    """
    if mesh is None:
        return jax.device_put(_read(weight, stored, (slice(None),) * len(weight.shape)))
    placement = sharding.named(mesh, weight.axes, weight.shape, "sampling")
    holders: dict[tuple[Any, ...], list[jax.Device]] = {}  # pyright: ignore[reportInvalidTypeForm]
    for device, index in placement.addressable_devices_indices_map(weight.shape).items():
        assert index is not None
        holders.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
    shards = []
    for bounds, devices in holders.items():
        host = _read(weight, stored, tuple(slice(*each) for each in bounds))
        # Wait, so that the host copy is freed before the next one is made.
        shards += jax.block_until_ready([jax.device_put(host, device) for device in devices])
    return jax.make_array_from_single_device_arrays(weight.shape, placement, shards)


def _read(weight: Weight, stored: Sequence[Stored], index: tuple[slice, ...]) -> np.ndarray:
    """Returns the slice `index` of a weight, in the dtype of the weight."""
    sizes = [len(range(*cut.indices(size))) for cut, size in zip(index, weight.shape, strict=True)]
    out = np.empty(sizes, jnp.dtype(weight.dtype))
    depth = len(weight.stack)
    numbers = np.arange(len(stored)).reshape(weight.stack_shape)[index[:depth]]
    for place, number in np.ndenumerate(numbers):
        _copy(out[place], _part(weight, stored[int(number)], index[depth:]))
    return out


def _part(weight: Weight, stored: Stored, index: tuple[slice, ...]) -> np.ndarray:
    """Returns the slice `index` of one tensor of the stack, in our layout."""
    view = stored.view()
    if isinstance(view, Mxfp4):  # a matrix of an expert, outputs first; only the slice is dequantized
        inputs, outputs = index
        return view[outputs, inputs].T
    return from_file(weight, view)[index]


def _copy(out: np.ndarray, view: np.ndarray) -> None:
    """Computes `out[...] = view` in tiles that fit into the cache: twice as fast for transposed views."""
    for corner in itertools.product(*(range(0, size, _TILE) for size in out.shape)):
        tile = tuple(slice(start, start + _TILE) for start in corner)
        out[tile] = view[tile]
