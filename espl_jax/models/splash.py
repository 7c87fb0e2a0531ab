"""Attention of a long level with jax's splash attention kernel for TPU, which keeps the scores on chip.

Computes the same function as `attention.attend`, in the cases that the kernel supports (`fits`). The kernel
implements FlashAttention-2 (Dao 2023, arXiv 2307.08691).
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
"""Block size of the kernel, in queries and in columns; levels are padded to a multiple of it."""

SHORTEST = 2 * BLOCK
"""The kernel is used for levels of at least this many tokens. It saves time by keeping scores on chip and by
skipping blocks that the causal mask hides. A level of one block has none to skip, and its scores stay on chip
in plain attention as well."""


def fits(
    steps: int, ancestors: Sequence[Source], decoder: DecoderConfig, window: jax.Array | int = 0
) -> bool:
    """Returns whether the kernel supports the attention of a level of `steps` tokens, and is faster.

    False for short levels; for windows that are traced or that may reach into ancestors, because the distance
    between tokens then depends on the row while the kernel's mask must be static; and for
    `matmul_precision="highest"`, because the kernel has no full float32 products.
    """
    fixed = isinstance(window, int) and not (window and ancestors)
    return steps >= SHORTEST and fixed and decoder.matmul_precision != "highest"


def on_tpu(x: jax.Array) -> bool:
    """Returns whether the program being traced will run on TPU: on the mesh of `x`, or without a mesh, on the
    default backend."""
    mesh = jax.typeof(x).sharding.mesh
    kind = jax.default_backend() if mesh.abstract_device is None else mesh.abstract_device.device_kind
    return kind.lower().startswith("tpu")


def splash_attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ancestors: Sequence[Source],
    decoder: DecoderConfig,
    window: int = 0,
    sinks: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attends to the ancestors and, causally, to the level itself, with a single softmax over both.

    Shared keys and values are copied for every row, which is cheap next to the attention of a long level. On
    a mesh (taken from the arguments' shardings), rows are sharded over the data axes and kv heads over the
    tensor axis, where sizes are divisible. Differentiable in the queries, in the keys and values of the level
    and of the ancestors, and in the sinks.

    Args:
      query: [R, T, N, H], rotated.
      key, value: [R, T, K, H], of the level itself; keys rotated.
      ancestors: outermost first.
      decoder: head counts, `query_scale` and `phase`. The kernel rounds operands to `dtype`; softmax and sums
        are float32.
      window: number of tokens that a query attends to, itself included; 0 for no window.
      sinks: [N], as for `attend`; the kernel takes them in the dtype of the queries.
      interpret: run the kernel in interpret mode on CPU, which is slow.

    Returns:
      [R, T, N, H]. Right padding needs no mask, because the causal mask hides it from every real token.

    Raises:
      ValueError: if there are both a window and ancestors.
    """
    if window and ancestors:
        raise ValueError(
            f"window={window}: may reach into ancestors, which the kernel's mask does not support; use attend"
        )
    rows, steps, _, head = query.shape
    ancestors = [source.by_row() for source in ancestors]
    query = (query * (decoder.query_scale or head**-0.5)).transpose(0, 2, 1, 3)  # [R, N, T, H]

    def per_row(shared: jax.Array) -> jax.Array:
        """[A, ...] -> [R, ...]."""
        return jnp.repeat(shared, rows // shared.shape[0], axis=0)

    # Concatenate columns per row: the ancestors', the level's own, then padding hidden by the causal mask.
    keys = [per_row(s.key.swapaxes(0, 1)) for s in ancestors]  # [R, K, H, C]
    values = [per_row(s.value.swapaxes(0, 1)) for s in ancestors]  # [R, K, C, H]
    seen = [per_row(s.filled) for s in ancestors]  # [R, C]
    key = jnp.concatenate([*keys, key.transpose(0, 2, 3, 1)], axis=3)
    value = jnp.concatenate([*values, value.transpose(0, 2, 1, 3)], axis=2)
    seen = jnp.concatenate([*seen, jnp.ones((rows, steps), bool)], axis=1).astype(jnp.int32)
    before = key.shape[3] - steps
    query, key = _padded(query, axis=2), _padded(key, axis=3)
    value, seen = _padded(value, axis=2), _padded(seen, axis=1)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array, *sinks: jax.Array):
        """Attends with [R, N, T, H], [R, K, H, S], [R, K, S, H], [R, S] and [N], or one device's parts."""
        shape = query.shape[2], value.shape[2]
        mask = kernels.LocalMask(shape, (window - 1, 0), 0) if window else kernels.CausalMask(shape, before)
        kernel = kernels.make_splash_mha_single_device(
            kernels.MultiHeadMask([mask] * query.shape[1]),
            block_sizes=_block_sizes(),
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
        segments = kernels.SegmentIds(jnp.ones((query.shape[0], shape[0]), jnp.int32), seen)
        # The kernel takes keys as [S, H]; SEQ_MINOR in `_block_sizes` says that they are stored as [H, S].
        given = query, key.swapaxes(2, 3), value, segments, *sinks
        return cast(jax.Array, jax.vmap(kernel, (0, 0, 0, 0, *(None for _ in sinks)))(*given))

    logits = () if sinks is None else (sinks.astype(query.dtype),)
    mesh = sharding.mesh_of(query)
    if mesh is not None:
        # The compiler does not shard a Pallas kernel by itself.
        heads = sharding.named(mesh, ("rows", "kv_heads", None, None), key.shape, decoder.phase).spec
        attend = jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(heads, heads, heads, jax.P(heads[0]), *(jax.P(heads[1]) for _ in logits)),
            out_specs=heads,
            check_vma=False,
        )
    out = attend(query, key, value, seen, *logits)
    return out[:, :, :steps].transpose(0, 2, 1, 3)


def _padded(x: jax.Array, axis: int) -> jax.Array:
    """Pads an axis with zeros to a multiple of the block size."""
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
