"""The arrays of slots, the KV caches of rows: reading and writing one row, and their storage in int8."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from espl_jax.models import int8
from espl_jax.models.config import DecoderConfig
from espl_jax.sampling.sizes import TPU_LANES

Slots = tuple[jax.Array, ...]
"""Keys [L, K, W, H, C] and values [L, K, W, C, H] of W slots; if they are int8, also the scales of the keys
and of the values, float32 [L, K, W, C] each."""


def stored(arrays: Slots, slots: Slots) -> Slots:
    """Returns keys and values as `slots` hold them: the same, or in int8 with their scales."""
    if slots[0].dtype != jnp.int8:
        return arrays
    (key, key_scale), (value, value_scale) = (
        int8.quantize(x, (axis,)) for x, axis in zip(arrays, (-2, -1), strict=True)
    )
    return key, value, key_scale, value_scale


def restored(slots: Slots, decoder: DecoderConfig) -> Slots:
    """Returns keys and values in `decoder.dtype`: the inverse of `stored`."""
    if slots[0].dtype != jnp.int8:
        return slots
    key, value, *scales = slots
    return tuple(
        int8.dequantize(x, scale, (axis,)).astype(decoder.dtype)
        for x, scale, axis in zip((key, value), scales, (-2, -1), strict=True)
    )


def row_of(arrays: Slots, row: jax.Array) -> Slots:
    """Returns the arrays of one node, with 1 for the number of nodes."""
    return tuple(jax.lax.dynamic_slice_in_dim(x, row, 1, axis=2) for x in arrays)


def write_row(slots: Slots, new: Slots, slot: jax.Array, column: jax.Array | int) -> Slots:
    """Writes the columns of one row, starting at `column`; in place if the slots are donated."""
    key, *others = (
        functools.partial(jax.lax.dynamic_update_slice, old, x) for old, x in zip(slots, new, strict=True)
    )
    starts = (0, 0, slot, column, 0), (0, 0, slot, column), (0, 0, slot, column)
    written = tuple(write(start) for write, start in zip(others, starts[: len(others)], strict=True))
    if slots[0].dtype == jnp.int8 and not isinstance(column, int) and slots[0].shape[4] % TPU_LANES == 0:
        return _write_in_tiles(slots[0], new[0], slot, column), *written
    return key((0, 0, slot, 0, column)), *written


def _write_in_tiles(slots: jax.Array, new: jax.Array, slot: jax.Array, column: jax.Array) -> jax.Array:
    """Writes the int8 keys of one row as whole tiles of columns. TPUs would copy all slots to another layout
    to write at any other column, and back.

    Args:
      slots: int8 [L, K, W, H, C], C a multiple of `TPU_LANES`.
      new: int8 [L, K, 1, H, c].
      slot, column: int32 [], where to write.
    """
    tiles = -(-(new.shape[4] + TPU_LANES - 1) // TPU_LANES)
    tiles = min(tiles, slots.shape[4] // TPU_LANES)
    first = jnp.minimum(column // TPU_LANES, slots.shape[4] // TPU_LANES - tiles) * TPU_LANES
    start = (0, 0, slot, 0, first)
    old = jax.lax.dynamic_slice(slots, start, (*slots.shape[:2], 1, slots.shape[3], tiles * TPU_LANES))
    # Selected, because the compiler would merge two updates into one.
    shifted = jax.lax.dynamic_update_slice(jnp.zeros_like(old), new, (0, 0, 0, 0, column - first))
    back = jnp.arange(old.shape[4]) - (column - first)
    merged = jnp.where((back >= 0) & (back < new.shape[4]), shifted, old)
    return jax.lax.dynamic_update_slice(slots, merged, start)
