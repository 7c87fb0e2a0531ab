"""Grouped-query attention of one level of the prefix tree over its ancestors' caches and itself.

A level has R nodes of T tokens each; an ancestor has A nodes, and A divides R: the R / A nodes that share
one ancestor node lie side by side. With the kv heads K leading, an ancestor's view of the queries is only
a reshape, `[K, R, T*G, H] -> [K, A, (R/A)*T*G, H]`, so shared keys are read once for all who share them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from espl_jax.models.config import DecoderConfig

QUERY_BLOCK = 512
"""Longest run of queries attended at once; longer levels go block by block, so scores stay [.., block, S]."""

ATTENTION = "attention"
"""What the result of attention is called, for policies of recomputation to name."""

_HIDDEN = -1e30


@struct.dataclass
class KVCache:
    """Keys and values of one level of the tree, for all layers.

    Keys are stored with their columns last, so that a product with queries reads them as they lie.

    Attributes:
      key: [L, K, A, H, C], already rotated; A nodes with capacity for C tokens each.
      value: [L, K, A, C, H].
      start: int32 [A], position of column 0 in its sequence.
      length: int32 [A], columns filled; those beyond are never attended to.
      owner: int32 [R], the node above each of the R rows that attend, for rows in any order; None where the
        rows of a node lie side by side, equally many for each.
      parts: where nodes and rows lie in so many equal parts, `owner` counts within the row's part.
    """

    key: jax.Array
    value: jax.Array
    start: jax.Array
    length: jax.Array
    owner: jax.Array | None = None
    parts: int = struct.field(pytree_node=False, default=1)

    @property
    def end(self) -> jax.Array:
        """int32 [A], the position after the last filled column."""
        return self.start + self.length

    @property
    def filled(self) -> jax.Array:
        """bool [A, C]."""
        return jnp.arange(self.value.shape[3]) < self.length[:, None]


@struct.dataclass
class RowsView:
    """Some slots and columns of a larger cache of rows, read in place: no array is copied to make it.

    The W slots lie in `shards` equal parts, one for each group of devices that holds them; the view is of the
    first R / shards slots of each part.

    Attributes:
      key: [L, K, W, H, C]; value: [L, K, W, C, H].
      start: int32 [R], position of column 0; length: int32 [R], columns filled.
      columns: how many are read; at least the length of every row whose result is used.
      shards: parts of the slots.
    """

    key: jax.Array
    value: jax.Array
    start: jax.Array
    length: jax.Array
    columns: int = struct.field(pytree_node=False)
    shards: int = struct.field(pytree_node=False, default=1)
    owner: None = struct.field(pytree_node=False, default=None)
    parts: int = struct.field(pytree_node=False, default=1)

    end = KVCache.end

    @property
    def filled(self) -> jax.Array:
        """bool [R, columns]."""
        return jnp.arange(self.columns) < self.length[:, None]

    def layer(self, index: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Keys [K, R, H, columns] and values [K, R, columns, H] of one layer."""
        rows = self.length.shape[0]
        heads, _, head = self.value.shape[1], self.value.shape[2], self.value.shape[4]

        def cut(x: jax.Array, sizes: tuple[int, int]) -> jax.Array:
            parts = x.reshape(*x.shape[:2], self.shards, -1, *x.shape[3:])
            shape = (1, heads, self.shards, rows // self.shards, *sizes)
            return jax.lax.dynamic_slice(parts, (index, 0, 0, 0, 0, 0), shape).reshape(heads, rows, *sizes)

        return cut(self.key, (head, self.columns)), cut(self.value, (self.columns, head))


class Source(NamedTuple):
    """What queries may look at, in one layer.

    Attributes:
      key: [K, A, H, C], rotated; value: [K, A, C, H].
      filled: bool [A, C].
      start: int32 [A], position of column 0.
      owner: int32 [R] or None, parts: as in `KVCache`.
    """

    key: jax.Array
    value: jax.Array
    filled: jax.Array
    start: jax.Array
    owner: jax.Array | None = None
    parts: int = 1

    def by_row(self) -> Source:
        """The same with a copy for each row, instead of an owner."""
        if self.owner is None:
            return self
        key, value = (of_owners(x, self.owner, self.parts, axis=1) for x in (self.key, self.value))
        filled, start = (of_owners(x, self.owner, self.parts) for x in (self.filled, self.start))
        return Source(key, value, filled, start)


def of_owners(x: jax.Array, owner: jax.Array, parts: int = 1, axis: int = 0) -> jax.Array:
    """What each row's node has. x [.., A, ..] with nodes on `axis`, owner int32 [R] -> [.., R, ..].

    Each part is looked up by itself, so that nothing moves between the devices that hold them. A node's
    gradient is the sum of its rows', taken in float32 and rounded once.
    """
    return _of_owners(x, owner, parts, axis, x.shape[axis])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _of_owners(x: jax.Array, owner: jax.Array, parts: int, axis: int, nodes: int) -> jax.Array:
    return _looked_up(x, owner, parts, axis)


def _of_owners_forward(x: jax.Array, owner: jax.Array, parts: int, axis: int, nodes: int):
    return _looked_up(x, owner, parts, axis), owner


def _of_owners_backward(parts: int, axis: int, nodes: int, owner: jax.Array, g: jax.Array):
    summed = jax.ShapeDtypeStruct((*g.shape[:axis], nodes, *g.shape[axis + 1 :]), jnp.float32)
    pull_back = jax.linear_transpose(lambda x: _looked_up(x, owner, parts, axis), summed)
    return pull_back(g.astype(jnp.float32))[0].astype(g.dtype), None


_of_owners.defvjp(_of_owners_forward, _of_owners_backward)


def _looked_up(x: jax.Array, owner: jax.Array, parts: int, axis: int) -> jax.Array:
    if parts == 1:
        return jnp.take(x, owner, axis=axis, mode="clip")
    split = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
    taken = jax.vmap(lambda x, o: jnp.take(x, o, axis=axis, mode="clip"), (axis, 0), axis)(
        split, owner.reshape(parts, -1)
    )
    return taken.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


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
    # Worth a copy: comparing every row with every node is what a single query alone can afford, in one part.
    ancestors = [source.by_row() if steps > 1 or source.parts > 1 else source for source in ancestors]
    kv, groups = config.num_kv_heads, config.num_heads // config.num_kv_heads
    query = query.reshape(rows, steps, kv, groups, head).transpose(2, 0, 1, 3, 4)  # [K, R, T, G, H]
    own = key.transpose(2, 0, 3, 1), value.transpose(2, 0, 1, 3)  # [K, R, H, T], [K, R, T, H]
    held = [*((s.key, s.value) for s in ancestors), own]

    def block(queries: jax.Array, first: jax.Array | int, held: list[tuple[jax.Array, jax.Array]]):
        """Queries [K, R, t, G, H] that begin at column `first` of the level, over all keys and values."""
        size = queries.shape[2]
        columns = first + jnp.arange(size)
        back = columns[:, None] - jnp.arange(steps)  # [t, T], how far each query looks back
        seen = (back >= 0) & _within(back, window)
        masks = [(_visible(s, start, columns, groups, window), s.owner is not None) for s in ancestors]
        masks.append((jnp.repeat(seen, groups, axis=0)[None], False))  # [1, t*G, T]
        masked = [(*arrays, *mask) for arrays, mask in zip(held, masks, strict=True)]
        return _attend_all(queries.reshape(kv, rows, size * groups, head), masked, config).reshape(
            queries.shape
        )

    if steps <= QUERY_BLOCK:
        out = block(query, 0, held)
    else:
        count = -(-steps // QUERY_BLOCK)
        query = jnp.pad(query, ((0, 0), (0, 0), (0, count * QUERY_BLOCK - steps), (0, 0), (0, 0)))
        blocks = jnp.moveaxis(query.reshape(kv, rows, count, QUERY_BLOCK, groups, head), 2, 0)
        firsts = jnp.arange(count) * QUERY_BLOCK
        # In float32 outside of the loop, so that gradients are summed over the blocks in float32.
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), held)

        def narrowed(queries: jax.Array, first: jax.Array) -> jax.Array:
            return block(queries, first, jax.tree.map(lambda x, y: x.astype(y.dtype), wide, held))

        out = jax.lax.map(lambda x: jax.checkpoint(narrowed)(*x), (blocks, firsts))
        out = jnp.moveaxis(out, 0, 2).reshape(kv, rows, count * QUERY_BLOCK, groups, head)[:, :, :steps]
    return out.transpose(1, 2, 0, 3, 4).reshape(rows, steps, config.num_heads, head)


def _within(back: jax.Array, window: jax.Array | int) -> jax.Array | bool:
    """Whether a token so far back is inside of the window; all are where there is none."""
    return True if isinstance(window, int) and not window else back < window


def _visible(
    source: Source, start: jax.Array, columns: jax.Array, groups: int, window: jax.Array | int
) -> jax.Array:
    """Which columns of an ancestor are seen: bool [A, Q, C], or Q = 1 where all of a node's queries agree."""
    nodes, capacity = source.filled.shape
    mask = source.filled[:, None, :]
    if source.owner is not None:
        mine = source.owner == jnp.arange(nodes)[:, None]  # [A, R]
        mask = mask & jnp.repeat(mine, len(columns) * groups, axis=1)[:, :, None]
    if isinstance(window, int) and not window:
        return mask
    positions = start[:, None] + columns  # [R, t]
    positions = positions.reshape(nodes if source.owner is None else 1, -1, 1)
    back = positions - (source.start[:, None] + jnp.arange(capacity))[:, None, :]
    return mask & jnp.repeat(_within(back, window), groups, axis=1)


def _attend_all(query: jax.Array, sources: list[tuple[Any, ...]], config: DecoderConfig) -> jax.Array:
    """One softmax over several sources without joining them. query [K, R, Q, H] -> [K, R, Q, H]."""
    kv, rows, count, head = query.shape
    precision = jax.lax.Precision.HIGHEST if config.matmul_precision == "highest" else None
    query = query * (config.query_scale or head**-0.5)

    def per_node(x: jax.Array, nodes: int, owned: bool) -> jax.Array:
        """[K, R, Q, x] as each node's rows see it, [K, A, (R/A)*Q, x]; every row for every node if owned."""
        if owned:
            return x.reshape(kv, 1, rows * count, x.shape[-1])
        return x.reshape(kv, nodes, rows // nodes * count, x.shape[-1])

    def per_row(x: jax.Array, owned: bool, join: Callable[..., jax.Array]) -> jax.Array:
        """The inverse; nodes that a row does not belong to add nothing."""
        return (join(x, axis=1) if owned else x).reshape(kv, rows, count, x.shape[-1])

    scores, tops = [], []
    for key, _, mask, owned in sources:
        nodes = key.shape[1]
        view = per_node(query, nodes, owned)
        view = jnp.broadcast_to(view, (kv, nodes, *view.shape[2:]))
        score = jnp.einsum(
            "kaqh,kahc->kaqc", view, key, precision=precision, preferred_element_type=jnp.float32
        )
        scores.append(jnp.where(mask[None], score, _HIDDEN))
        tops.append(per_row(scores[-1].max(axis=-1, keepdims=True), owned, jnp.max))

    # The largest score only keeps exp in range; the result does not depend on it.
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    total, out = 0.0, 0.0
    for score, (_, value, _, owned) in zip(scores, sources, strict=True):
        weight = jnp.exp(score - per_node(largest, value.shape[1], owned))
        total += per_row(weight.sum(axis=-1, keepdims=True), owned, jnp.sum)
        part = jnp.einsum(
            "kaqc,kach->kaqh",
            weight.astype(value.dtype),
            value,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        out += per_row(part, owned, jnp.sum)
    return jnp.divide(out, total).astype(query.dtype)
