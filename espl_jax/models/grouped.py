"""Grouped matrix products: rows sorted by group, each group multiplied by its own matrix.

Per backend:

- TPU: the megablox kernels of jax (Gale et al. 2022, arXiv 2211.15841), which visit only groups that have
  rows. They compute the products of the rows, and read the matrices of these groups alone. The program that
  libtpu 0.0.52 compiles from `lax.ragged_dot` reads the matrices of all groups, and has a product of all rows
  with each of them, under a mask.
  For int8 matrices, which these kernels refuse, the kernel of `grouped_int8` converts each part on chip.
- Elsewhere: `lax.ragged_dot`. On CPU this is a product of all rows with all groups as well: correct, and E /
  active times as expensive as needed. Int8 matrices are converted as a whole.

Shape letters: R rows, E groups, I inputs, O outputs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from espl_jax.models import grouped_int8
from espl_jax.models.config import DecoderConfig
from espl_jax.models.splash import on_tpu

TILE_BYTES = 3 * 2**20
"""Maximum bytes of the part of a matrix that the kernel holds on chip; two parts at a time."""


SCOPE = "experts_{}_of_{}"
"""Name scope of a product: experts on the device, of all. `plan.hlo` reads from it how many experts a kernel
can visit, which the shapes of a stack do not show."""


class InStack(NamedTuple):
    """The matrices of one layer, or its biases or scales, read in place from those of all layers.

    Attributes:
      weights: [L, E, I, O], or [L, E, O].
      layer: int32 [], index into `weights`.
    """

    weights: jax.Array
    layer: jax.Array


@dataclasses.dataclass(frozen=True)
class _How:
    """How to multiply: dtypes of operands and results, precision, and whether by the TPU kernel."""

    operands: str
    results: str
    precision: jax.lax.Precision | None
    kernel: bool


def product(
    x: jax.Array,
    weight: jax.Array | InStack,
    sizes: jax.Array,
    decoder: DecoderConfig,
    scale: jax.Array | InStack | None = None,
) -> jax.Array:
    """Multiplies each group of rows by its matrix.

    Differentiable in `x` unless `weight` is `InStack`, and in a float `weight`.

    Args:
      x: [R, I], sorted by group.
      weight: [E, I, O], or one layer of such a stack.
      sizes: int32 [E], number of rows of each group; their sum may be less than R.
      decoder: `dtype`, `matmul_precision`.
      scale: float32 [E, O], the scales of the outputs of int8 matrices, or one layer of a stack of them.

    Returns:
      [R, O], zero for rows that are in no group; float32 if `matmul_precision` is `bfloat16` (operands and
      cotangents are rounded to bfloat16), else in `decoder.dtype`.
    """
    rounds = decoder.matmul_precision == "bfloat16"
    highest = decoder.matmul_precision == "highest"
    how = _How(
        operands="bfloat16" if rounds else decoder.dtype,
        results="float32" if rounds else decoder.dtype,
        precision=jax.lax.Precision.HIGHEST if highest else None,
        kernel=on_tpu(x) and not highest,  # the kernel has no full float32 products
    )
    total = decoder.experts.count if decoder.experts else len(sizes)
    with jax.named_scope(SCOPE.format(len(sizes), total)):
        if not isinstance(weight, InStack):
            assert not isinstance(scale, InStack)
            return _product(how, x, weight, sizes) if scale is None else _scaled(how, x, weight, scale, sizes)
        (stack, layer), of_layer = weight, None if scale is None else _of_layer(scale)
        if not how.kernel:
            return _forward(how, x, _of_layer(weight), sizes, of_layer)
        every = jnp.zeros(stack.shape[:2], jnp.int32).at[layer].set(sizes).reshape(-1)
        return _forward(how, x, stack.reshape(-1, *stack.shape[2:]), every, of_layer)


def _of_layer(given: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(given.weights, given.layer, keepdims=False)


def add_bias(x: jax.Array, bias: jax.Array | InStack, group: jax.Array) -> jax.Array:
    """Adds to each row the bias of its group, in float32.

    Differentiable in `x`, and in `bias` unless it is `InStack`.

    Args:
      x: [R, O].
      bias: [E, O], or one layer of a stack of them.
      group: int32 [R]; rows of group E are in no group and stay as they are.

    Returns:
      [R, O], in the dtype of `x`.
    """
    if isinstance(bias, InStack):
        return _added(x, bias.weights.at[bias.layer, group].get(mode="fill", fill_value=0))
    return _add_bias(len(bias), x, bias, group)


def _added(x: jax.Array, rows: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) + rows.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_bias(count: int, x: jax.Array, bias: jax.Array, group: jax.Array) -> jax.Array:
    return _added(x, bias.at[group].get(mode="fill", fill_value=0))


def _add_bias_forward(count: int, x: jax.Array, bias: jax.Array, group: jax.Array):
    return _add_bias(count, x, bias, group), (bias[:0], group)


def _add_bias_backward(count: int, operands: tuple[jax.Array, jax.Array], g: jax.Array):
    # A product with the one-hot groups, because TPUs scatter rows one by one. It is exact: ones and zeros
    # do not round, and sums are float32.
    empty, group = operands
    chosen = (group == jnp.arange(count)[:, None]).astype(g.dtype)
    summed = jnp.matmul(chosen, g, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return g, summed.astype(empty.dtype), None


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _How, x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    return _forward(how, x, weight, sizes)


def _product_forward(how: _How, x: jax.Array, weight: jax.Array, sizes: jax.Array):
    return _forward(how, x, weight, sizes), (x, weight, sizes)


def _product_backward(how: _How, operands: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array):
    x, weight, sizes = operands
    x_bar = _forward(how, g, weight, sizes, transposed=True).astype(x.dtype)
    return x_bar, _outer(how, x, g, sizes).astype(weight.dtype), None


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled(how: _How, x: jax.Array, weight: jax.Array, scale: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiplies by int8 matrices, which have no gradient."""
    return _forward(how, x, weight, sizes, scale)


def _scaled_forward(how: _How, x: jax.Array, weight: jax.Array, scale: jax.Array, sizes: jax.Array):
    return _forward(how, x, weight, sizes, scale), (jnp.empty(0, x.dtype), weight, scale, sizes)


def _scaled_backward(how: _How, residuals: tuple[jax.Array, ...], g: jax.Array):
    like, weight, scale, sizes = residuals
    x_bar = _forward(how, g, weight, sizes, scale, transposed=True)
    return x_bar.astype(like.dtype), None, None, None


_scaled.defvjp(_scaled_forward, _scaled_backward)


def _forward(
    how: _How,
    x: jax.Array,
    weight: jax.Array,
    sizes: jax.Array,
    scale: jax.Array | None = None,
    transposed: bool = False,
) -> jax.Array:
    """Multiplies groups of rows [R, I] by [E, I, O], or by the transpose of [E, O, I]. Returns [R, O].

    The scales of int8 matrices belong to their last axis.
    """
    rows = x.shape[0]
    if not how.kernel:
        if scale is not None:
            # Rows that are in no group get some scale; their products are 0.
            scale = jnp.repeat(scale, sizes, axis=0, total_repeat_length=rows)
        if scale is not None and transposed:
            x = x.astype(jnp.float32) * scale
        x, weight = x.astype(how.operands), weight.astype(how.operands)
        weight = weight.swapaxes(1, 2) if transposed else weight
        if scale is None or transposed:
            return jax.lax.ragged_dot(x, weight, sizes, how.precision, how.results)
        out = jax.lax.ragged_dot(x, weight, sizes, how.precision, jnp.float32)
        return (out * scale).astype(how.results)
    x = x.astype(how.operands)
    inputs, outputs = weight.shape[1:][:: -1 if transposed else 1]
    tiles = _tiles(rows, inputs, outputs, x.dtype.itemsize)
    x = jnp.pad(x, ((0, -rows % tiles[0]), (0, 0)))
    if scale is None:
        weight = weight.astype(how.operands)
        out = gmm(x, weight, sizes, jnp.dtype(how.results), tiles, transpose_rhs=transposed)[:rows]
    else:
        out = grouped_int8.product(x, weight, scale, sizes, how.results, tiles, transposed)[:rows]
    # The kernel does not write rows that are in no group.
    return jnp.where(jnp.arange(rows)[:, None] < sizes.sum(), out, 0)


def _outer(how: _How, x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    """Sums the outer products of the rows of each group. [R, I], [R, O] -> [E, I, O]."""
    x, g = x.astype(how.operands), g.astype(how.operands)
    if not how.kernel:
        contracted = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        )
        return jax.lax.ragged_dot_general(
            x, g, sizes, contracted, precision=how.precision, preferred_element_type=how.results
        )
    tiles = _tiles(x.shape[0], x.shape[1], g.shape[1], x.dtype.itemsize)
    x, g = (jnp.pad(each, ((0, -each.shape[0] % tiles[0]), (0, 0))) for each in (x, g))
    return tgmm(x.swapaxes(0, 1), g, sizes, jnp.dtype(how.results), tiles)


def _tiles(rows: int, inputs: int, outputs: int, itemsize: int) -> tuple[int, int, int]:
    """Returns the kernel's tile sizes: few rows, so that little is computed beyond the ends of groups, and if
    possible all inputs, so that a group's matrix is read once for all of its tiles."""
    wide = min(inputs, 2048)
    fitting = max(128, TILE_BYTES // (itemsize * wide) // 128 * 128)
    return min(128, -(-rows // 16) * 16), wide, min(outputs, fitting)
