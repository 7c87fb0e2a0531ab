"""Grouped matrix products with int8 matrices: a TPU kernel.

The grid and its metadata are those of jax's megablox kernel (Gale et al. 2022, arXiv 2211.15841), which takes
float matrices only: for every tile of outputs, the tiles of rows of each group that has rows, and for these,
the tiles of inputs. Matrices are read as int8 and converted on chip.

Shape letters: R rows, E groups, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata


@functools.partial(jax.jit, static_argnames=("results", "tiles", "transposed", "interpret"))
def product(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array,
    sizes: jax.Array,
    results: str,
    tiles: tuple[int, int, int],
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies each group of rows by its matrix.

    Args:
      x: [R, I] in the dtype of the operands, sorted by group; R is a multiple of the first tile size.
      weight: int8 [E, I, O], or with `transposed` [E, O, I].
      scale: float32, of the last axis of `weight`: [E, O], or with `transposed` [E, I]. Of several layers'
        groups, of which one layer's have rows, that layer's scales are enough: [E / layers, ...].
      sizes: int32 [E], number of rows of each group.
      results: dtype of the result.
      tiles: tile sizes of rows, inputs and outputs.
      transposed: whether the matrices are transposed.
      interpret: whether to interpret the kernel, for tests without a TPU.

    Returns:
      [R, O]. Rows that are in no group are not written.
    """
    rows, inputs = x.shape
    outputs = weight.shape[1 if transposed else 2]
    tile_rows, tile_inputs, tile_outputs = tiles
    steps, rest = pl.cdiv(inputs, tile_inputs), inputs % tile_inputs
    metadata, visits = make_group_metadata(
        group_sizes=sizes,
        m=rows,
        tm=tile_rows,
        start_group=jnp.int32(0),
        num_nonzero_groups=len(sizes),
        visit_empty_groups=False,
    )

    def real(x: jax.Array, axis: int, step: jax.Array) -> jax.Array:
        """Zeroes what a tile has beyond the last input."""
        if not rest:
            return x
        place = step * tile_inputs + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        return jnp.where(place < inputs, x, jnp.zeros_like(x))

    def kernel(metadata: Any, x: Any, weight: Any, scale: Any, out: Any, total: Any) -> None:
        offsets, groups, row_tiles = metadata
        visit, step = pl.program_id(1), pl.program_id(2)

        @pl.when(step == 0)
        def _clear() -> None:
            total[...] = jnp.zeros_like(total)

        left = x[...]
        if transposed:
            left = (left.astype(jnp.float32) * scale[...]).astype(left.dtype)
        right = weight[...].astype(jnp.float32).astype(left.dtype)
        total[...] += jax.lax.dot_general(
            real(left, 1, step),
            real(right, int(transposed), step),
            (((1,), (int(transposed),)), ((), ())),
            preferred_element_type=jnp.float32,
        )

        @pl.when(step == steps - 1)
        def _store() -> None:
            first = offsets[groups[visit]] - row_tiles[visit] * tile_rows
            last = offsets[groups[visit] + 1] - row_tiles[visit] * tile_rows
            row = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
            # The other rows of the tile belong to groups that were, or will be, visited next to this one.
            scaled = total[...] if transposed else total[...] * scale[...]
            out[...] = jnp.where((row >= first) & (row < last), scaled, out[...].astype(jnp.float32)).astype(
                out.dtype
            )

    def of_weight(output: Any, visit: Any, step: Any, metadata: Any) -> Any:
        return metadata[1][visit], *((output, step) if transposed else (step, output))

    of_tile = (tile_outputs, tile_inputs) if transposed else (tile_inputs, tile_outputs)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.dtype(results)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[
                pl.BlockSpec((tile_rows, tile_inputs), lambda _, visit, step, at: (at[2][visit], step)),
                pl.BlockSpec((None, *of_tile), of_weight),
                pl.BlockSpec(
                    (None, 1, of_tile[1]),
                    lambda output, visit, step, at: (
                        at[1][visit] % len(scale),
                        0,
                        step if transposed else output,
                    ),
                ),
            ],
            out_specs=pl.BlockSpec(
                (tile_rows, tile_outputs), lambda output, visit, _, at: (at[2][visit], output)
            ),
            grid=(pl.cdiv(outputs, tile_outputs), visits, steps),
            scratch_shapes=[pltpu.VMEM((tile_rows, tile_outputs), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inputs * outputs,
            bytes_accessed=x.nbytes * pl.cdiv(outputs, tile_outputs)
            + inputs * outputs * metadata[1].size
            + rows * outputs * jnp.dtype(results).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )(metadata, x, weight, scale[:, None])
