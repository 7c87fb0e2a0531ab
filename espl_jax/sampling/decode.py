"""The device side of sampling: prefill, a jitted chunk of decode steps, and what moves rows between slots.

A run of rollouts owns one cache of W slots, reserved once. Nothing in it is ever copied as a whole: rows are
admitted into free slots, move into the low ones when few are left, and are extended behind what they hold,
all in place. A chunk reads the first slots and columns only, as many as are in use. With a mesh the slots lie
in equal shards, one for each group of devices that shares rows, and a row never leaves its shard. The host
knows every row's state and gives it to each call, see `Rows`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from espl_jax.models.attention import KVCache, RowsView
from espl_jax.models.config import DecoderConfig
from espl_jax.models.transformer import forward, unembed
from espl_jax.parallel import sharding
from espl_jax.sampling import draw
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation

Slots = tuple[jax.Array, jax.Array]
"""Keys [L, K, W, H, C] and values [L, K, W, C, H] of W slots."""


class Rows(NamedTuple):
    """The rows of a call, R of them: those in the first R / shards slots of each shard.

    Attributes:
      lane: int32 [R], the system prompt's number.
      start: int32 [R], position of column 0: where the system prompt ends.
      length: int32 [R], columns that the slot holds: the problem and all tokens after it, but for `token`. A
        chunk writes behind them, also for a row that waits.
      token: int32 [R], the last token, which no slot holds yet.
      position: int32 [R], tokens since the prompt; the next one is drawn with it folded into the key.
      limit: int32 [R], where `position` has to stop; at most `position` for a slot without a row to decode.
      key: uint32 [R, 2], key data.
    """

    lane: jax.Array
    start: jax.Array
    length: jax.Array
    token: jax.Array
    position: jax.Array
    limit: jax.Array
    key: jax.Array


class Drawn(NamedTuple):
    """What one chunk drew.

    Attributes:
      tokens: int32 [R, steps], valid in the first `count` columns.
      logprobs: float32 [R, steps], under the distribution drawn from.
      untruncated_logprobs: float32 [R, steps], under softmax(logits / temperature).
      cutoffs: float32 [R, steps], untruncated logprob below which nothing could be drawn.
      count: int32 [R].
      stopped: bool [R], whether the row drew a stop token.
      steps: int32 [], steps run.
    """

    tokens: jax.Array
    logprobs: jax.Array
    untruncated_logprobs: jax.Array
    cutoffs: jax.Array
    count: jax.Array
    stopped: jax.Array
    steps: jax.Array


def abstract_slots(
    config: DecoderConfig, slots: int, capacity: int, mesh: Mesh | None, everywhere: bool = False
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of slots with room for `capacity` tokens each, and where they lie: rows in equal shards, or
    `everywhere`, as the caches of shared levels do."""
    shape = (config.num_layers, config.num_kv_heads, slots)
    shapes = (*shape, config.head_dim, capacity), (*shape, capacity, config.head_dim)
    key, value = (
        jax.ShapeDtypeStruct(
            shape,
            jnp.dtype(config.dtype),
            sharding=None if mesh is None else sharding.cache_sharding(mesh, shape, everywhere),
        )
        for shape in shapes
    )
    return key, value


def abstract_rows(count: int, mesh: Mesh | None) -> Rows:
    """Shapes of the rows of a call."""
    numbers = jax.ShapeDtypeStruct((count,), jnp.int32)
    keys = jax.ShapeDtypeStruct((count, 2), jnp.uint32)
    return sharding.place_rows(Rows._make((*(numbers,) * 6, keys)), mesh)


def reserve(config: DecoderConfig, slots: int, capacity: int, mesh: Mesh | None) -> Slots:
    """Empty slots, each with room for `capacity` tokens."""
    shapes = abstract_slots(config, slots, capacity, mesh)
    key, value = (jnp.zeros(x.shape, x.dtype, device=x.sharding) for x in shapes)
    return key, value


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def prefill(
    params: Any,
    config: DecoderConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    system: KVCache | None = None,
    *,
    mesh: Mesh | None = None,
) -> KVCache:
    """Cache of one shared level.

    Args:
      params: with adapters or not.
      config: the decoder.
      tokens: int32 [M, S], the system prompts; or [M * P, Q], problems without each prompt's last token,
        under `system`, as many for each system prompt.
      lengths: int32 [M] or [M * P].
      system: the level above, or None.
      mesh: the cache lies on all devices, its heads as the weights' heads do.
    """
    _, cache = forward(params, config, tokens, lengths, () if system is None else (system,))
    if mesh is None:
        return cache
    key, value = (
        jax.lax.with_sharding_constraint(x, sharding.cache_sharding(mesh, x.shape, everywhere=True))
        for x in (cache.key, cache.value)
    )
    return KVCache(key, value, cache.start, cache.length)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="slots")
def admit(
    slots: Slots,
    problems: KVCache,
    nodes: jax.Array,
    into: jax.Array,
    count: jax.Array,
    *,
    mesh: Mesh | None = None,
) -> Slots:
    """Copies problems into slots, where their rows begin.

    Args:
      slots: donated.
      problems: caches of Q columns, no more than the slots have.
      nodes: int32 [shards, k], which problem; into: int32 [shards, k], into which slot of the shard.
      count: int32 [shards], how many of the k.
    """

    def local(slots: Slots, problems: Slots, nodes: jax.Array, into: jax.Array, count: jax.Array) -> Slots:
        def put(i: jax.Array, slots: Slots) -> Slots:
            return _write(slots, _row(problems, nodes[0, i]), into[0, i], 0)

        return jax.lax.fori_loop(0, count[0], put, slots)

    over_parts = sharding.over_parts(local, mesh, ("slots", "everywhere", "rows", "rows", "rows"), "slots")
    return over_parts(slots, (problems.key, problems.value), nodes, into, count)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="slots")
def move(
    slots: Slots, source: jax.Array, target: jax.Array, count: jax.Array, *, mesh: Mesh | None = None
) -> Slots:
    """Copies slots over others of their shards, one after another.

    Args:
      slots: donated.
      source, target: int32 [shards, k], slots of the shard; count: int32 [shards], how many of the k.
    """

    def local(slots: Slots, source: jax.Array, target: jax.Array, count: jax.Array) -> Slots:
        # One write for each read: an exchange of two would keep a copy of all slots.
        def put(i: jax.Array, slots: Slots) -> Slots:
            return _write(slots, _row(slots, source[0, i]), target[0, i], 0)

        return jax.lax.fori_loop(0, count[0], put, slots)

    return sharding.over_parts(local, mesh, ("slots", "rows", "rows", "rows"), "slots")(
        slots, source, target, count
    )


@functools.partial(jax.jit, static_argnames=("config", "columns", "mesh"), donate_argnames="slots")
def extend(
    params: Any,
    config: DecoderConfig,
    system: KVCache,
    slots: Slots,
    at: jax.Array,
    rows: Rows,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    columns: int,
    mesh: Mesh | None = None,
) -> Slots:
    """Prefills tokens that somebody else appended to some rows, each at its own positions.

    Args:
      params: with adapters or not.
      config: the decoder.
      system: cache of the system prompts, M nodes.
      slots: donated; these have at least T free columns.
      at: int32 [shards, k], the rows' slots within their shards.
      rows: the k rows of each shard, [shards * k]; `lane`, `start` and `length` are looked at.
      tokens: int32 [shards * k, T], beginning with each row's `token`; lengths: int32 [shards * k], 0 for
        none.
      columns: at least the longest length.
    """
    count = at.shape[1]

    def gather(slots: Slots, at: jax.Array) -> Slots:
        key, value = slots
        return key[:, :, at[0], :, :columns], value[:, :, at[0], :columns]

    def put_back(slots: Slots, new: Slots, at: jax.Array, length: jax.Array, number: jax.Array) -> Slots:
        def put(i: jax.Array, slots: Slots) -> Slots:
            def write(slots: Slots) -> Slots:
                return _write(slots, _row(new, i), at[0, i], length[i])

            return jax.lax.cond(number[i] > 0, write, lambda slots: slots, slots)

        return jax.lax.fori_loop(0, count, put, slots)

    key, value = sharding.over_parts(gather, mesh, ("slots", "rows"), "slots")(slots, at)
    own = KVCache(key, value, rows.start, rows.length)
    owned = dataclasses.replace(system, owner=rows.lane)
    _, new = forward(params, config, tokens, lengths, (owned, own))
    kinds = ("slots", "slots", "rows", "rows", "rows")
    return sharding.over_parts(put_back, mesh, kinds, "slots")(
        slots, (new.key, new.value), at, rows.length, lengths
    )


@functools.partial(
    jax.jit,
    static_argnames=("config", "columns", "steps", "greedy", "truncation", "aligned", "mesh"),
    donate_argnames="slots",
)
def decode_chunk(
    params: Any,
    config: DecoderConfig,
    system: KVCache,
    slots: Slots,
    rows: Rows,
    stop_ids: jax.Array,
    temperature: jax.Array,
    allowed: jax.Array | None = None,
    *,
    columns: int,
    steps: int,
    greedy: bool = False,
    truncation: Truncation = UNTRUNCATED,
    aligned: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Slots, Drawn]:
    """Up to `steps` tokens for every row; ends early when all rows are done.

    Inside the loop the slots are only read. New keys and values go to a staging buffer with one column a step
    for all rows, written once for all layers, and are folded into the slots at the end.

    Args:
      params: with adapters or not.
      config: the decoder.
      system: cache of the system prompts, M nodes, read once for all rows.
      slots: donated. Every slot has `steps` free columns.
      rows: R rows, see `Rows`.
      stop_ids: int32 [any]; drawing one of them ends a row, the token included.
      temperature: float32 []; unused when greedy.
      allowed: uint32 [R, ceil(V / 32)], the tokens that each row may draw, see `Constraint`; all by default.
        Probabilities are then those among the allowed tokens. Goes with a chunk of one step.
      columns: how many of each slot are attended to: at least the longest `rows.length`.
      steps: columns of the chunk.
      greedy: take the most likely token instead of drawing.
      truncation: top-k, top-p, min-p.
      aligned: whether rows lie lane by lane, equally many each. Then a system prompt is compared with its own
        rows alone; otherwise with all, which costs no memory traffic but M times the arithmetic.
      mesh: of devices; the slots lie on it.

    Returns:
      (slots, what was drawn, in `steps` columns).

    Raises:
      ValueError: for `allowed` and more than one step.
    """
    if allowed is not None and steps != 1:
        raise ValueError(f"steps={steps}: what is allowed holds for one step")
    count = rows.token.shape[0]
    shards = sharding.row_shards(mesh)
    held = RowsView(*slots, rows.start, rows.length, columns, shards)
    system = system if aligned else dataclasses.replace(system, owner=rows.lane)
    shape = (config.num_layers, config.num_kv_heads, count)
    staging = (
        jnp.zeros((*shape, config.head_dim, steps), config.dtype),
        jnp.zeros((*shape, steps, config.head_dim), config.dtype),
    )
    staging = tuple(sharding.constrain_cache(x, mesh) for x in staging)
    zeros = jnp.zeros((count, steps), jnp.float32)
    drawn = Drawn(
        jnp.zeros((count, steps), jnp.int32),
        zeros,
        zeros,
        zeros,
        jnp.zeros(count, jnp.int32),
        jnp.zeros(count, bool),
        jnp.int32(0),
    )

    def proceed(carry):
        _, _, done, drawn = carry
        return (drawn.steps < steps) & ~done.all()

    def body(carry):
        (key, value), token, done, drawn = carry
        step = drawn.steps
        staged = KVCache(key, value, held.end, jnp.full(count, step, jnp.int32))
        hidden, new = forward(params, config, token[:, None], ancestors=(system, held, staged))
        # Drawing is divided by rows, whatever the head's product was divided by.
        logits = unembed(params, config, hidden[:, 0])
        logits = sharding.constrain(logits, ("rows", "vocab"), config.phase)
        if allowed is not None:
            logits = draw.only_allowed(logits, allowed)
        if greedy:
            token, untruncated = draw.greedy(logits)
            logprob, cutoff = jnp.zeros_like(untruncated), jnp.full_like(untruncated, -jnp.inf)
        else:
            uniform = draw.uniforms(rows.key, rows.position + step)
            token, logprob, untruncated, cutoff = draw.draw(logits, uniform, temperature, truncation)
        staging = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, x, step, axis)
            for old, x, axis in zip((key, value), (new.key, new.value), (4, 3), strict=True)
        )

        def put(column: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(column, jnp.where(done, 0, x)[:, None], step, axis=1)

        stop = ~done & (token[:, None] == stop_ids).any(axis=1)
        drawn = Drawn(
            put(drawn.tokens, token),
            put(drawn.logprobs, logprob),
            put(drawn.untruncated_logprobs, untruncated),
            put(drawn.cutoffs, cutoff),
            drawn.count + ~done,
            drawn.stopped | stop,
            step + 1,
        )
        done = done | stop | (rows.position + drawn.count >= rows.limit)
        return staging, token, done, drawn

    carry = (staging, rows.token, rows.position >= rows.limit, drawn)
    staging, _, _, drawn = jax.lax.while_loop(proceed, body, carry)

    def fold(slots: Slots, staging: Slots, length: jax.Array) -> Slots:
        # Row by row and in place: one scatter for all rows would copy the caches.
        def put(row: jax.Array, slots: Slots) -> Slots:
            return _write(slots, _row(staging, row), row, length[row])

        return jax.lax.fori_loop(0, length.shape[0], put, slots)

    folded = sharding.over_parts(fold, mesh, ("slots", "slots", "rows"), "slots")(slots, staging, rows.length)
    # Every process reads all that was drawn, and takes the same decisions on it.
    return folded, sharding.constrain_everywhere(drawn, mesh)


def _row(arrays: Slots, row: jax.Array) -> Slots:
    """One node's keys and values, [L, K, 1, H, C] and [L, K, 1, C, H]."""
    key, value = (jax.lax.dynamic_slice_in_dim(x, row, 1, axis=2) for x in arrays)
    return key, value


def _write(slots: Slots, new: Slots, slot: jax.Array, column: jax.Array | int) -> Slots:
    """Writes one row's columns behind `column`, in place where the slots are donated."""
    (key, value), (new_key, new_value) = slots, new
    return (
        jax.lax.dynamic_update_slice(key, new_key, (0, 0, slot, 0, column)),
        jax.lax.dynamic_update_slice(value, new_value, (0, 0, slot, column, 0)),
    )
