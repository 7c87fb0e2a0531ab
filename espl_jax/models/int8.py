"""Rounding of matmul weights to int8: symmetric, with one float32 scale per output channel.

The scale is the largest magnitude among the inputs of an output channel, divided by 127, so that every value
fits, and `int8 * scale` differs from the weight by at most half a scale. The functions take numpy arrays, so
that loading needs no device, and jax arrays, whose operations they trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = 127
"""Largest magnitude of a stored value; -128 is not used."""

_Array = TypeVar("_Array", jax.Array, np.ndarray)


def scales(values: _Array, input_axes: Sequence[int]) -> _Array:
    """Returns the scale of every output channel, float32: the shape of `values` without its input axes.

    A channel of zeros has scale 0.

    Args:
      values: a weight in any float dtype, or a stack of weights.
      input_axes: the axes that a matmul contracts, counted from the end (`Weight.input_axes`).
    """
    np_ = _namespace(values)
    return np_.abs(values).max(axis=tuple(input_axes)).astype(np.float32) / np.float32(LARGEST)


def rounded(values: _Array, scale: _Array, input_axes: Sequence[int]) -> _Array:
    """Returns `values / scale`, rounded to the nearest int8, ties to even.

    Args:
      values: a weight in any float dtype, a stack of weights, or a part of one.
      scale: those of its output channels, float32.
      input_axes: as for `scales`.
    """
    np_ = _namespace(values)
    divisor = np_.expand_dims(np_.where(scale > 0, scale, np.float32(1)), tuple(input_axes))
    return np_.clip(np_.rint(values.astype(np.float32) / divisor), -LARGEST, LARGEST).astype(np.int8)


def quantize(values: _Array, input_axes: Sequence[int]) -> tuple[_Array, _Array]:
    """Returns a weight, or a stack of weights, in int8, and its scales. Arguments as for `scales`."""
    scale = scales(values, input_axes)
    return rounded(values, scale, input_axes), scale


def dequantize(values: _Array, scale: _Array, input_axes: Sequence[int]) -> _Array:
    """Returns `values * scale` of each output channel, float32. Arguments as for `rounded`."""
    return values.astype(np.float32) * _namespace(values).expand_dims(scale, tuple(input_axes))


def _namespace(values: jax.Array | np.ndarray) -> ModuleType:
    return jnp if isinstance(values, jax.Array) else np
