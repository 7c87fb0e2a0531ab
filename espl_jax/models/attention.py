"""Grouped-query attention of one level of the prefix tree over its ancestors' caches and itself.

A level has R nodes of T tokens each; an ancestor has A nodes, and A divides R: the R / A nodes that share
one ancestor node lie side by side. With the kv heads K leading, an ancestor's view of the queries is only
a reshape, `[K, R, T*G, H] -> [K, A, (R/A)*T*G, H]`, so shared keys are read once for all who share them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from espl_jax.models.config import DecoderConfig

QUERY_BLOCK = 512
"""Longest run of queries attended at once; longer levels go block by block, so scores stay [.., block, S]."""

_HIDDEN = -1e30


@struct.dataclass
class KVCache:
    """Keys and values of one level of the tree, for all layers.

    Attributes:
      key: [L, K, A, C, H], already rotated; A nodes with capacity for C tokens each.
      value: [L, K, A, C, H].
      start: int32 [A], position of column 0 in its sequence.
      length: int32 [A], columns filled; those beyond are never attended to.
    """

    key: jax.Array
    value: jax.Array
    start: jax.Array
    length: jax.Array

    @property
    def end(self) -> jax.Array:
        """int32 [A], the position after the last filled column."""
        return self.start + self.length


class Source(NamedTuple):
    """What queries may look at, in one layer.

    Attributes:
      key, value: [K, A, C, H], keys rotated.
      filled: bool [A, C].
      start: int32 [A], position of column 0.
    """

    key: jax.Array
    value: jax.Array
    filled: jax.Array
    start: jax.Array


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ancestors: Sequence[Source],
    config: DecoderConfig,
    start: jax.Array,
    window: jax.Array | int = 0,
) -> jax.Array:
    """Attends to the ancestors and, causally, to the level itself, under one softmax.

    Args:
      query: [R, T, N, H], rotated.
      key, value: [R, T, K, H], the level's own, rotated.
      ancestors: outermost first.
      config: head counts and precision.
      start: int32 [R], position of the level's first tokens.
      window: how many tokens a query sees, itself included; the plain 0 for all before it. A traced number
        must be positive.

    Returns:
      [R, T, N, H]. Right padding needs no mask here: causality hides it from every real token.
    """
    rows, steps, _, head = query.shape
    kv, groups = config.num_kv_heads, config.num_heads // config.num_kv_heads
    query = query.reshape(rows, steps, kv, groups, head).transpose(2, 0, 1, 3, 4)  # [K, R, T, G, H]
    own = key.transpose(2, 0, 1, 3), value.transpose(2, 0, 1, 3)  # [K, R, T, H]

    def block(queries: jax.Array, first: jax.Array | int) -> jax.Array:
        """Queries [K, R, t, G, H] that begin at column `first` of the level."""
        size = queries.shape[2]
        columns = first + jnp.arange(size)
        back = columns[:, None] - jnp.arange(steps)  # [t, T], how far each query looks back
        seen = (back >= 0) & _within(back, window)
        masked = [(s.key, s.value, _visible(s, start, columns, groups, window)) for s in ancestors]
        masked.append((*own, jnp.repeat(seen, groups, axis=0)[None]))  # [1, t*G, T]
        return _attend_all(queries.reshape(kv, rows, size * groups, head), masked, config).reshape(
            queries.shape
        )

    if steps <= QUERY_BLOCK:
        out = block(query, 0)
    else:
        count = -(-steps // QUERY_BLOCK)
        query = jnp.pad(query, ((0, 0), (0, 0), (0, count * QUERY_BLOCK - steps), (0, 0), (0, 0)))
        blocks = jnp.moveaxis(query.reshape(kv, rows, count, QUERY_BLOCK, groups, head), 2, 0)
        firsts = jnp.arange(count) * QUERY_BLOCK
        out = jax.lax.map(lambda x: jax.checkpoint(block)(*x), (blocks, firsts))
        out = jnp.moveaxis(out, 0, 2).reshape(kv, rows, count * QUERY_BLOCK, groups, head)[:, :, :steps]
    return out.transpose(1, 2, 0, 3, 4).reshape(rows, steps, config.num_heads, head)


def _within(back: jax.Array, window: jax.Array | int) -> jax.Array | bool:
    """Whether a token so far back is inside of the window; all are where there is none."""
    return True if isinstance(window, int) and not window else back < window


def _visible(
    source: Source, start: jax.Array, columns: jax.Array, groups: int, window: jax.Array | int
) -> jax.Array:
    """Which columns of an ancestor are seen: bool [A, 1, C], or with a window [A, (R/A)*t*G, C]."""
    filled = source.filled[:, None, :]
    if isinstance(window, int) and not window:
        return filled
    nodes, capacity = source.filled.shape
    positions = (start[:, None] + columns).reshape(nodes, -1, 1)  # [A, (R/A)*t, 1]
    back = positions - (source.start[:, None] + jnp.arange(capacity))[:, None, :]
    return filled & jnp.repeat(_within(back, window), groups, axis=1)


def _attend_all(query: jax.Array, sources: list[tuple[jax.Array, ...]], config: DecoderConfig) -> jax.Array:
    """One softmax over several sources without joining them. query [K, R, Q, H] -> [K, R, Q, H]."""
    kv, rows, count, head = query.shape
    precision = jax.lax.Precision.HIGHEST if config.matmul_precision == "highest" else None
    query = query * (config.query_scale or head**-0.5)

    scores = []
    for key, _, mask in sources:
        nodes = key.shape[1]
        view = query.reshape(kv, nodes, rows // nodes * count, head)
        score = jnp.einsum(
            "kaqh,kach->kaqc", view, key, precision=precision, preferred_element_type=jnp.float32
        )
        score = score.reshape(kv, nodes, -1, mask.shape[1], key.shape[2])
        score = jnp.where(mask[None, :, None], score, _HIDDEN)
        scores.append(score.reshape(kv, rows, count, key.shape[2]))

    # The largest score only keeps exp in range; the result does not depend on it.
    largest = jax.lax.stop_gradient(
        functools.reduce(jnp.maximum, [s.max(axis=-1, keepdims=True) for s in scores])
    )
    total, out = 0.0, 0.0
    for score, (_, value, _) in zip(scores, sources, strict=True):
        nodes, capacity = value.shape[1:3]
        weight = jnp.exp(score - largest)
        total += weight.sum(axis=-1, keepdims=True)
        view = weight.astype(value.dtype).reshape(kv, nodes, rows // nodes * count, capacity)
        part = jnp.einsum(
            "kaqc,kach->kaqh", view, value, precision=precision, preferred_element_type=jnp.float32
        )
        out += part.reshape(kv, rows, count, head)
    return (out / total).astype(query.dtype)
