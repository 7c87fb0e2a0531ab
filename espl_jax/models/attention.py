"""Grouped-query attention of one level of the prefix tree, over its ancestors' caches and itself.

A level has R nodes of T tokens each. An ancestor has A nodes, where A divides R, and the R / A nodes below
one ancestor node are adjacent. With the kv heads K as the leading axis, grouping queries by ancestor node is
a reshape, `[K, R, T*G, H] -> [K, A, (R/A)*T*G, H]`, so shared keys are read once for all nodes below them.

Latent attention (`models.latent`) has caches of a single head, whatever K. It is not copied for the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from espl_jax.choices import MOST_DRAFT_TOKENS
from espl_jax.models.config import DecoderConfig
from espl_jax.parallel import sharding

QUERY_BLOCK = 512
"""Most queries processed at once; longer levels are processed in blocks, with scores [.., block, S]."""

ATTENTION = "attention"
"""Name of the attention output, for checkpoint (remat) policies."""

_HIDDEN = -1e30


@struct.dataclass
class KVCache:
    """Keys and values of one level of the tree, for all layers.

    Keys are stored with columns last, so that the product with queries reads them without a transpose.

    The heads and widths are those of `DecoderConfig.cache_shape`.

    Attributes:
      key: [L, K, A, H, C], rotated; A nodes with a capacity of C tokens each.
      value: [L, K, A, C, H].
      start: int32 [A], position of column 0 in its sequence.
      length: int32 [A], columns filled; columns beyond are never attended to.
      owner: int32 [R], index of the node above each of the R attending rows, which may be in any order; None
        if the rows of each node are adjacent and equally many.
      parts: number of equal parts that nodes and rows are split into; `owner` is an index within the row's
        part.
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
        """bool [A, C], which columns are filled."""
        return jnp.arange(self.value.shape[3]) < self.length[:, None]

    @property
    def positions(self) -> jax.Array:
        """int32 [A, C], position of each column."""
        return self.start[:, None] + jnp.arange(self.value.shape[3])


@struct.dataclass
class GappedCache:
    """Keys and values of rows, with columns in between that hold nothing.

    Attributes:
      key: [L, K, R, H, C], rotated.
      value: [L, K, R, C, H].
      filled: bool [R, C], which columns are filled.
      positions: int32 [R, C], position of each filled column.
      end: int32 [R], the position after the last filled column.
    """

    key: jax.Array
    value: jax.Array
    filled: jax.Array
    positions: jax.Array
    end: jax.Array
    owner: None = struct.field(pytree_node=False, default=None)
    parts: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class RowsView:
    """A view of some slots and columns of the cache of rows. Creating it copies nothing.

    The W slots are split into `shards` equal parts, one for each group of devices. The view covers the first
    R / shards slots of each part.

    Attributes:
      key: [L, K, W, H, C], rotated.
      value: [L, K, W, C, H].
      start: int32 [R], position of column 0.
      length: int32 [R], columns filled.
      columns: number of columns read; at least the length of every row whose result is used.
      shards: number of parts of the slots.
      scales: of int8 keys and of int8 values, float32 [L, K, W, C] each; None if they are not int8.
    """

    key: jax.Array
    value: jax.Array
    start: jax.Array
    length: jax.Array
    columns: int = struct.field(pytree_node=False)
    shards: int = struct.field(pytree_node=False, default=1)
    scales: tuple[jax.Array, ...] | None = None
    owner: None = struct.field(pytree_node=False, default=None)
    parts: int = struct.field(pytree_node=False, default=1)

    end = KVCache.end

    @property
    def filled(self) -> jax.Array:
        """bool [R, columns], which columns are filled."""
        return jnp.arange(self.columns) < self.length[:, None]

    def source(self, index: jax.Array | int, window: jax.Array | int = 0) -> Source:
        """Returns the keys and values of one layer: of a short static window only the last columns, which are
        all that the tokens after them see, else all `columns`.

        A window is copied before it is read, so it costs the traffic of three times its columns.
        """
        if not isinstance(window, int) or not 0 < 3 * window < self.columns:
            positions = self.start[:, None] + jnp.arange(self.columns)
            key, value, *scales = self.layer(index)
            return Source(key, value, self.filled, positions, scales=tuple(scales) or None)
        first = jnp.maximum(self.length - window, 0)
        columns = first[:, None] + jnp.arange(window)
        filled, positions = columns < self.length[:, None], self.start[:, None] + columns
        key, value, *scales = self._last(index, first, window)
        return Source(key, value, filled, positions, scales=tuple(scales) or None)

    @property
    def _arrays(self) -> list[tuple[jax.Array, int]]:
        """The arrays of the slots, each with its axis of columns."""
        return [(self.key, 4), (self.value, 3), *((x, 3) for x in self.scales or ())]

    def _last(self, index: jax.Array | int, first: jax.Array, count: int) -> list[jax.Array]:
        """Returns `count` columns of one layer, from column `first` of each row on, of each array."""
        axes = [axis for _, axis in self._arrays]

        def gather(slots: tuple[jax.Array, ...], first: jax.Array) -> tuple[jax.Array, ...]:
            def of_row(slot: jax.Array, column: jax.Array) -> tuple[jax.Array, ...]:
                cut = []
                for x, axis in zip(slots, axes, strict=True):
                    start, size = [jnp.zeros_like(slot)] * x.ndim, list(x.shape)
                    for at, place, length in ((0, index, 1), (2, slot, 1), (axis, column, count)):
                        start[at], size[at] = jnp.asarray(place, slot.dtype), length
                    cut.append(jax.lax.dynamic_slice(x, start, size)[:, :, 0])
                return tuple(cut)

            slots_of_part = slots[0].shape[2] // parts
            slot = jnp.arange(len(first)).reshape(parts, -1)
            slot += (slots_of_part - slot.shape[1]) * jnp.arange(parts)[:, None]
            # One row after another: TPUs would copy the caches of all layers for a gather.
            rows = jax.lax.map(lambda each: of_row(*each), (slot.reshape(-1), first))
            return tuple(jnp.moveaxis(x, 0, 2) for x in rows)

        mesh = sharding.mesh_of(first)
        parts = self.shards if mesh is None else 1
        gathered = sharding.over_parts(gather, mesh, ("slots", "rows"), "slots")
        return [x[0] for x in gathered(tuple(x for x, _ in self._arrays), first)]

    def layer(self, index: jax.Array | int) -> list[jax.Array]:
        """Returns the keys [K, R, H, columns] and values [K, R, columns, H] of one layer, and with int8 their
        scales, [K, R, columns] each."""
        rows, heads = self.length.shape[0], self.value.shape[1]

        def cut(x: jax.Array, axis: int) -> jax.Array:
            parts = x.reshape(*x.shape[:2], self.shards, -1, *x.shape[3:])
            sizes = list(x.shape[3:])
            sizes[axis - 3] = self.columns
            shape = (1, heads, self.shards, rows // self.shards, *sizes)
            start = (index, *(0,) * (len(shape) - 1))
            return jax.lax.dynamic_slice(parts, start, shape).reshape(heads, rows, *sizes)

        return [cut(x, axis) for x, axis in self._arrays]


class Source(NamedTuple):
    """Keys and values of one level that queries attend to, in one layer.

    Attributes:
      key: [K, A, H, C], rotated.
      value: [K, A, C, H].
      filled: bool [A, C], which columns are filled.
      positions: int32 [A, C], position of each column.
      owner: int32 [R] or None, as in `KVCache`.
      parts: as in `KVCache`.
      scales: of int8 keys and of int8 values, float32 [K, A, C] each; None if they are not int8.
    """

    key: jax.Array
    value: jax.Array
    filled: jax.Array
    positions: jax.Array
    owner: jax.Array | None = None
    parts: int = 1
    scales: tuple[jax.Array, ...] | None = None

    def by_row(self) -> Source:
        """Returns an equivalent source without `owner`, with one copy of the keys and values per row."""
        if self.owner is None:
            return self
        key, value = (of_owners(x, self.owner, self.parts, axis=1) for x in (self.key, self.value))
        filled, positions = (of_owners(x, self.owner, self.parts) for x in (self.filled, self.positions))
        return Source(key, value, filled, positions)


def of_owners(x: jax.Array, owner: jax.Array, parts: int = 1, axis: int = 0) -> jax.Array:
    """Gathers the entry of each row's node. x [.., A, ..], A on `axis`; owner int32 [R] -> [.., R, ..].

    Each part is gathered separately, so there is no communication between the devices that hold the parts.
    The gradient of a node is summed over its rows in float32 and rounded once.
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


DECODED = MOST_DRAFT_TOKENS + 1
"""Most tokens of a row that a decode step runs at once: the last token, and drafts of those after it."""


def is_decoding(steps: int, decoder: DecoderConfig) -> bool:
    """Returns whether a level of `steps` tokens per row is a decode step, bound by reading the cache."""
    return steps == 1 or (decoder.phase == "sampling" and steps <= DECODED)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ancestors: Sequence[Source],
    decoder: DecoderConfig,
    start: jax.Array,
    window: jax.Array | int = 0,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attends to the ancestors and, causally, to the level itself, with a single softmax over both.

    Args:
      query: [R, T, N, H], rotated. If queries are wider than keys, the rest of a query is compared with the
        values, which are then a part of the keys.
      key, value: [R, T, K, H], of the level itself; keys rotated. They may differ in width, and may have one
        head for all K.
      ancestors: outermost first.
      decoder: head counts and precision.
      start: int32 [R], position of the level's first tokens.
      window: number of tokens that a query attends to, itself included; a Python 0 for no window. A traced
        value must be positive.
      sinks: [N], a logit of each query head that joins its softmax and has no value: it only takes a share
        of the attention. Differentiable.

    Returns:
      [R, T, N, H], as wide as the values. Right padding needs no mask, because the causal mask hides it from
      every real token.
    """
    rows, steps, _, head = query.shape
    width = value.shape[-1]
    # Copy keys and values per row, unless there are few queries and a single part: only then is it cheaper to
    # score every row against every node.
    few = is_decoding(steps, decoder)
    ancestors = [source if few and source.parts == 1 else source.by_row() for source in ancestors]
    kv, groups = decoder.num_kv_heads, decoder.num_heads // decoder.num_kv_heads
    query = query.reshape(rows, steps, kv, groups, head).transpose(2, 0, 1, 3, 4)  # [K, R, T, G, H]
    own = key.transpose(2, 0, 3, 1), value.transpose(2, 0, 1, 3)  # [K, R, H, T], [K, R, T, H]
    held = [*((s.key, s.value) for s in ancestors), own]
    # Cast to float32 outside the loop over blocks below, as `held`.
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(kv, groups)

    def block(queries: jax.Array, first: jax.Array | int, held: list[tuple[jax.Array, jax.Array]]):
        """Attends from queries [K, R, t, G, H], starting at column `first`, to all keys and values."""
        size = queries.shape[2]
        columns = first + jnp.arange(size)
        back = columns[:, None] - jnp.arange(steps)  # [t, T], distance from query back to key
        seen = (back >= 0) & _within(back, window)
        masks = [
            (_visible(s, start, columns, groups, window), s.owner is not None, s.scales) for s in ancestors
        ]
        masks.append((jnp.repeat(seen, groups, axis=0)[None], False, None))  # [1, t*G, T]
        masked = [(*arrays, *mask) for arrays, mask in zip(held, masks, strict=True)]
        logits = None if sinks is None else jnp.tile(sinks, size)[:, None, :, None]  # [K, 1, t*G, 1]
        flat = queries.reshape(kv, rows, size * groups, head)
        return _attend_all(flat, masked, decoder, logits).reshape(*queries.shape[:-1], width)

    if steps <= QUERY_BLOCK:
        out = block(query, 0, held)
    else:
        count = -(-steps // QUERY_BLOCK)
        query = jnp.pad(query, ((0, 0), (0, 0), (0, count * QUERY_BLOCK - steps), (0, 0), (0, 0)))
        blocks = jnp.moveaxis(query.reshape(kv, rows, count, QUERY_BLOCK, groups, head), 2, 0)
        firsts = jnp.arange(count) * QUERY_BLOCK
        # Cast to float32 outside the loop, so that gradients are summed over the blocks in float32.
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), held)

        def narrowed(queries: jax.Array, first: jax.Array) -> jax.Array:
            return block(queries, first, jax.tree.map(lambda x, y: x.astype(y.dtype), wide, held))

        out = jax.lax.map(lambda x: jax.checkpoint(narrowed)(*x), (blocks, firsts))
        out = jnp.moveaxis(out, 0, 2).reshape(kv, rows, count * QUERY_BLOCK, groups, width)[:, :, :steps]
    return out.transpose(1, 2, 0, 3, 4).reshape(rows, steps, decoder.num_heads, width)


def _within(back: jax.Array, window: jax.Array | int) -> jax.Array | bool:
    """Returns whether a token `back` positions earlier is inside the window; always, without a window."""
    return True if isinstance(window, int) and not window else back < window


def _visible(
    source: Source, start: jax.Array, columns: jax.Array, groups: int, window: jax.Array | int
) -> jax.Array:
    """Returns the mask of an ancestor's columns, bool [A, Q, C]; Q = 1 if it is equal for all queries."""
    nodes = len(source.filled)
    mask = source.filled[:, None, :]
    if source.owner is not None:
        mine = source.owner == jnp.arange(nodes)[:, None]  # [A, R]
        mask = mask & jnp.repeat(mine, len(columns) * groups, axis=1)[:, :, None]
    if isinstance(window, int) and not window:
        return mask
    positions = start[:, None] + columns  # [R, t]
    positions = positions.reshape(nodes if source.owner is None else 1, -1, 1)
    back = positions - source.positions[:, None, :]
    return mask & jnp.repeat(_within(back, window), groups, axis=1)


def _attend_all(
    query: jax.Array, sources: list[tuple[Any, ...]], decoder: DecoderConfig, sinks: jax.Array | None
) -> jax.Array:
    """Computes one softmax over several sources without concatenating them. [K, R, Q, H] -> [K, R, Q, H].

    `sinks`, float32 [K, 1, Q, 1], are logits that join it.
    """
    kv, rows, count, _ = query.shape
    precision = jax.lax.Precision.HIGHEST if decoder.matmul_precision == "highest" else None
    query = query * (decoder.query_scale or decoder.head_dim**-0.5)

    def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """Multiplies in float32 by keys or values y, [K, ...] or [1, ...]."""
        y = y.astype(x.dtype) if y.dtype == jnp.int8 else y
        if y.shape[0] < kv:
            y, spec = y[0], spec.replace(",k", ",")
        return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=jnp.float32)

    def per_node(x: jax.Array, nodes: int, owned: bool) -> jax.Array:
        """Groups [K, R, Q, x] by node: [K, A, (R/A)*Q, x]; if owned, [K, 1, R*Q, x] for all nodes."""
        if owned:
            return x.reshape(kv, 1, rows * count, x.shape[-1])
        return x.reshape(kv, nodes, rows // nodes * count, x.shape[-1])

    def per_row(x: jax.Array, owned: bool, join: Callable[..., jax.Array]) -> jax.Array:
        """Inverts `per_node`; if owned, joins over nodes, where nodes other than the row's add nothing."""
        return (join(x, axis=1) if owned else x).reshape(kv, rows, count, x.shape[-1])

    def scaled(x: jax.Array, scales: tuple[jax.Array, ...] | None, which: int) -> jax.Array:
        """Multiplies [K, A, Q, C] by the scales of int8 keys or values, which belong to columns."""
        return x if scales is None else x * scales[which][:, :, None]

    scores, tops = [], [] if sinks is None else [sinks]
    for key, value, mask, owned, scales in sources:
        nodes = key.shape[1]
        view = per_node(query, nodes, owned)
        view = jnp.broadcast_to(view, (kv, nodes, *view.shape[2:]))
        width = key.shape[2]
        score = scaled(product("kaqh,kahc->kaqc", view[..., :width], key), scales, 0)
        if view.shape[-1] > width:
            score += scaled(product("kaqh,kach->kaqc", view[..., width:], value), scales, 1)
        scores.append(jnp.where(mask[None], score, _HIDDEN))
        tops.append(per_row(scores[-1].max(axis=-1, keepdims=True), owned, jnp.max))

    # The maximum only keeps exp in range; the result does not depend on it, so it needs no gradient.
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    total, out = 0.0 if sinks is None else jnp.exp(sinks - largest), 0.0
    for score, (_, value, _, owned, scales) in zip(scores, sources, strict=True):
        weight = jnp.exp(score - per_node(largest, value.shape[1], owned))
        total += per_row(weight.sum(axis=-1, keepdims=True), owned, jnp.sum)
        weight = scaled(weight, scales, 1).astype(query.dtype if value.dtype == jnp.int8 else value.dtype)
        part = product("kaqc,kach->kaqh", weight, value)
        out += per_row(part, owned, jnp.sum)
    return jnp.divide(out, total).astype(query.dtype)
