"""Tensors of files into arrays on devices, a shard at a time, so that the host never holds a whole model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espl_jax.models.transformer import Weight
from espl_jax.parallel import sharding
from espl_jax.pretrained.layout import from_file
from espl_jax.pretrained.safetensors_files import StoredTensor

_TILE = 128


def load_weight(weight: Weight, stored: Sequence[StoredTensor], mesh: Mesh | None) -> jax.Array:
    """Reads one weight onto its devices.

    The host holds one shard of it at a time, in the weight's dtype, beside what is mapped from the files. Of
    several processes each reads the shards of its own devices, and each shard once, however many have it.

    Args:
      weight: its declaration.
      stored: its tensor, or those of all layers in order where the weight is stacked; of the shape
        `layout.file_shape(weight)`.
      mesh: devices that share it, as `parallel.sharding` says of sampling; the default device when None.

    Returns:
      Array of `weight.shape` and `weight.dtype`; values are rounded to nearest where the file's are wider.
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
        # Waiting frees the host's copy before the next one is made.
        shards += jax.block_until_ready([jax.device_put(host, device) for device in devices])
    return jax.make_array_from_single_device_arrays(weight.shape, placement, shards)


def _read(weight: Weight, stored: Sequence[StoredTensor], index: tuple[slice, ...]) -> np.ndarray:
    """The part of a weight that `index` cuts out, in the weight's dtype."""
    sizes = [len(range(*cut.indices(size))) for cut, size in zip(index, weight.shape, strict=True)]
    out = np.empty(sizes, jnp.dtype(weight.dtype))
    if weight.axes[0] == "layers":
        layers, index = index[0], index[1:]
        for row, tensor in zip(out, stored[layers], strict=True):
            _copy(row, from_file(weight, tensor.view())[index])
    else:
        _copy(out, from_file(weight, stored[0].view())[index])
    return out


def _copy(out: np.ndarray, view: np.ndarray) -> None:
    """`out[...] = view` in tiles that fit a core's cache: most views are transposed, and twice as fast so."""
    for corner in itertools.product(*(range(0, size, _TILE) for size in out.shape)):
        tile = tuple(slice(start, start + _TILE) for start in corner)
        out[tile] = view[tile]
