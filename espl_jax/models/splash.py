"""Attention of a long level by the TPU kernel that jax ships, which keeps the scores on chip.

The same function as `attention.attend`, where the kernel can compute it (`fits`). The method is that of
FlashAttention-2 (Dao, 2023): https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from espl_jax.models.attention import ATTENTION, Source
from espl_jax.models.config import DecoderConfig
from espl_jax.parallel import sharding

BLOCK = 512
"""Queries and columns that the kernel multiplies at once; levels are padded to a multiple of it."""

SHORTEST = 2 * BLOCK
"""Tokens of a level from which the kernel is used. It gains by scores that never leave the chip and by blocks
that causality hides and it skips; a level of one block has none of the latter, and small scores stay on chip
in plain attention too."""


def fits(steps: int, ancestors: Sequence[Source], config: DecoderConfig, window: jax.Array | int = 0) -> bool:
    """Whether the kernel computes the attention of a level of `steps` tokens, and gains by it.

    Not for short levels. Not for windows that are traced, or that reach into ancestors: how far a token
    lies behind another then depends on the row, and the kernel wants its mask while the program is built.
    Not where products in full float32 are asked for, which the kernel does not have.
    """
    fixed = isinstance(window, int) and not (window and ancestors)
    return steps >= SHORTEST and fixed and config.matmul_precision != "highest"


def on_tpu(x: jax.Array) -> bool:
    """Whether the program being traced will run on TPUs: those of the mesh that `x` lies on, or of this
    machine where it lies on none."""
    mesh = jax.typeof(x).sharding.mesh
    kind = jax.default_backend() if mesh.abstract_device is None else mesh.abstract_device.device_kind
    return kind.lower().startswith("tpu")


def splash_attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ancestors: Sequence[Source],
    config: DecoderConfig,
    window: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Attends to the ancestors and, causally, to the level itself, under one softmax.

    What nodes share is copied for each of them, which costs little beside the attention of a long level.
    On a mesh (that of the arguments' shardings) rows are spread over the data axes and kv heads over the
    tensor axis, where they divide. Gradients flow to queries, keys and values of the level and the ancestors.

    Args:
      query: [R, T, N, H], rotated.
      key, value: [R, T, K, H], the level's own, rotated.
      ancestors: outermost first.
      config: head counts and the scores' factor. Products round as the kernel's do: operands to `dtype`,
        softmax and sums in float32.
      window: how many tokens a query sees, itself included; 0 for all before it.
      interpret: run the kernel's program on a CPU, slowly.

    Returns:
      [R, T, N, H]. Right padding needs no mask here: causality hides it from every real token.

    Raises:
      ValueError: for a window with ancestors.
    """
    if window and ancestors:
        raise ValueError(
            f"window={window} may reach into ancestors, which have no place in the kernel's mask; use attend"
        )
    rows, steps, _, head = query.shape
    ancestors = [source.by_row() for source in ancestors]
    query = (query * (config.query_scale or head**-0.5)).transpose(0, 2, 1, 3)  # [R, N, T, H]

    def per_row(shared: jax.Array) -> jax.Array:
        """[A, ...] -> [R, ...]."""
        return jnp.repeat(shared, rows // shared.shape[0], axis=0)

    # One run of columns a row: the ancestors', then the level's own, then padding that causality hides.
    keys = [per_row(s.key.swapaxes(0, 1)) for s in ancestors]  # [R, K, H, C]
    values = [per_row(s.value.swapaxes(0, 1)) for s in ancestors]  # [R, K, C, H]
    seen = [per_row(s.filled) for s in ancestors]  # [R, C]
    key = jnp.concatenate([*keys, key.transpose(0, 2, 3, 1)], axis=3)
    value = jnp.concatenate([*values, value.transpose(0, 2, 1, 3)], axis=2)
    seen = jnp.concatenate([*seen, jnp.ones((rows, steps), bool)], axis=1).astype(jnp.int32)
    before = key.shape[3] - steps
    query, key = _padded(query, axis=2), _padded(key, axis=3)
    value, seen = _padded(value, axis=2), _padded(seen, axis=1)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array) -> jax.Array:
        """[R, N, T, H], [R, K, H, S], [R, K, S, H] and [R, S], or the part of them that a device has."""
        shape = query.shape[2], value.shape[2]
        mask = kernels.LocalMask(shape, (window - 1, 0), 0) if window else kernels.CausalMask(shape, before)
        kernel = kernels.make_splash_mha_single_device(
            kernels.MultiHeadMask([mask] * query.shape[1]),
            block_sizes=_block_sizes(),
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
        segments = kernels.SegmentIds(jnp.ones((query.shape[0], shape[0]), jnp.int32), seen)
        # The kernel takes keys by column and is told that they are stored by head dimension.
        return cast(jax.Array, jax.vmap(kernel)(query, key.swapaxes(2, 3), value, segments))

    mesh = sharding.mesh_of(query)
    if mesh is not None:
        # The compiler does not divide a kernel among devices by itself.
        heads = sharding.named(mesh, ("rows", "kv_heads", None, None), key.shape, config.phase).spec
        attend = jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(heads, heads, heads, jax.P(heads[0])),
            out_specs=heads,
            check_vma=False,
        )
    out = attend(query, key, value, seen)
    return out[:, :, :steps].transpose(0, 2, 1, 3)


def _padded(x: jax.Array, axis: int) -> jax.Array:
    """Zeros appended up to a multiple of the block."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % BLOCK)
    return jnp.pad(x, widths)


def _block_sizes() -> kernels.BlockSizes:
    return kernels.BlockSizes(
        block_q=BLOCK,
        block_kv=BLOCK,
        block_kv_compute=BLOCK,
        block_q_dkv=BLOCK,
        block_kv_dkv=BLOCK,
        block_kv_dkv_compute=BLOCK,
        block_q_dq=BLOCK,
        block_kv_dq=BLOCK,
        k_layout=kernels.QKVLayout.SEQ_MINOR,
    )
