"""Loads weights from files onto devices, one shard at a time, so that the host never holds a whole model."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espl_jax.models import int8
from espl_jax.models.params import Weight
from espl_jax.parallel import sharding
from espl_jax.pretrained.layout import from_file
from espl_jax.pretrained.mxfp4 import Mxfp4
from espl_jax.pretrained.safetensors_files import Stored

BLOCK = 2**22
"""Most numbers that are rounded to int8 at a time, unless one output has more."""

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
    return _placed(weight, mesh, functools.partial(_read, weight, stored))


def load_int8(weight: Weight, stored: Sequence[Stored], mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """Reads one weight onto its devices, rounded to int8 (`models.int8`), with its scales.

    As `load_weight`, except that a process reads a weight whose inputs are sharded twice: a scale depends on
    all inputs.

    Args:
      weight: declaration of the int8 weight.
      stored: as for `load_weight`.
      mesh: as for `load_weight`.

    Returns:
      (values, scales): arrays as declared by `weight` and `weight.scale`.

    Raises:
      ValueError: if a number is not finite.
    """
    reader = _Int8(weight, stored)
    return _placed(weight, mesh, reader.values), _placed(weight.scale, mesh, reader.scales)


def quantize(
    weight: Weight, part: np.ndarray, name: str, scale: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds one tensor of a stack to int8, in blocks of outputs, so that temporary arrays are small.

    Args:
      weight: declaration of the stack.
      part: the tensor in our layout, in any float dtype, with all of its inputs unless there is a `scale`.
      name: what an error calls the tensor.
      scale: the scales of its outputs; by default computed.

    Returns:
      (values, scale): int8 [the shape of `part`] and float32 [outputs...].

    Raises:
      ValueError: if a number is not finite.
    """
    outputs = [axis for axis in range(part.ndim) if axis - part.ndim not in weight.input_axes]
    values, kept = np.empty(part.shape, np.int8), np.empty([part.shape[axis] for axis in outputs], np.float32)
    size = part.shape[outputs[0]]
    step = max(1, BLOCK * size // part.size)
    for cut in (slice(start, start + step) for start in range(0, size, step)):
        block = (*(slice(None),) * outputs[0], cut)
        wide = part[block].astype(np.float32)
        kept[cut] = int8.scales(wide, weight.input_axes) if scale is None else scale[cut]
        if not np.isfinite(kept[cut]).all():
            raise ValueError(f"{name}: holds a number that is not finite; download it again")
        _copy(values[block], int8.rounded(wide, kept[cut], weight.input_axes))
    return values, kept


def _placed(weight: Weight, mesh: Mesh | None, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """Returns a weight on its devices, from a function that reads a slice of it."""
    if mesh is None:
        return jax.device_put(read((slice(None),) * len(weight.shape)))
    placement = sharding.named(mesh, weight.axes, weight.shape, "sampling")
    holders: dict[tuple[Any, ...], list[jax.Device]] = {}  # pyright: ignore[reportInvalidTypeForm]
    for device, index in placement.addressable_devices_indices_map(weight.shape).items():
        assert index is not None
        holders.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
    shards = []
    for bounds, devices in holders.items():
        host = read(tuple(slice(*each) for each in bounds))
        # Wait, so that the host copy is freed before the next one is made.
        shards += jax.block_until_ready([jax.device_put(host, device) for device in devices])
    return jax.make_array_from_single_device_arrays(weight.shape, placement, shards)


def _read(weight: Weight, stored: Sequence[Stored], index: tuple[slice, ...]) -> np.ndarray:
    """Returns the slice `index` of a weight, in the dtype of the weight."""
    return _filled(weight, index, lambda number, part: _part(weight, stored[number], part))


def _filled(
    weight: Weight, index: tuple[slice, ...], read: Callable[[int, tuple[slice, ...]], np.ndarray]
) -> np.ndarray:
    """Returns the slice `index` of a weight, from a function of a tensor's number and the slice of it."""
    sizes = [len(range(*cut.indices(size))) for cut, size in zip(index, weight.shape, strict=True)]
    out = np.empty(sizes, jnp.dtype(weight.dtype))
    depth = len(weight.stack)
    numbers = np.arange(math.prod(weight.stack_shape)).reshape(weight.stack_shape)[index[:depth]]
    for place, number in np.ndenumerate(numbers):
        _copy(out[place], read(int(number), index[depth:]))
    return out


class _Int8:
    """The int8 values and the scales of a weight, to be read in slices."""

    def __init__(self, weight: Weight, stored: Sequence[Stored]):
        self._weight, self._stored = weight, stored
        self._axes = weight.axes[len(weight.stack) :]
        shape = len(stored), *weight.scale.shape[len(weight.stack) :]
        self._scales = np.full(shape, np.nan, np.float32)  # NaN until they are computed

    def values(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns the slice `index` of the values."""
        return _filled(self._weight, index, self._values)

    def scales(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns the slice `index` of the scales."""
        return _filled(self._weight.scale, index, self._scales_of)

    def _scales_of(self, number: int, outputs: tuple[slice, ...]) -> np.ndarray:
        if np.isnan(self._scales[number][outputs]).any():
            given = iter(outputs)
            index = (slice(None) if axis in self._weight.inputs else next(given) for axis in self._axes)
            self._values(number, tuple(index))
        return self._scales[number][outputs]

    def _values(self, number: int, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a slice of the values of one tensor; the first time, also computes the scales."""
        weight, stored = self._weight, self._stored[number]

        def cut(inputs: bool, outputs: bool) -> tuple[slice, ...]:
            """Returns `index`, with all of the inputs or of the outputs where they are not cut."""
            cuts = (inputs if axis in weight.inputs else outputs for axis in self._axes)
            return tuple(x if is_cut else slice(None) for x, is_cut in zip(index, cuts, strict=True))

        kept = [x for axis, x in zip(self._axes, index, strict=True) if axis not in weight.inputs]
        scale = self._scales[number][tuple(kept)]
        if not np.isnan(scale).any():
            return quantize(weight, _part(weight, stored, index), str(stored.path), scale)[0]
        part = _part(weight, stored, cut(inputs=False, outputs=True))
        values, scale[...] = quantize(weight, part, str(stored.path))
        return values[cut(inputs=True, outputs=False)]


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
