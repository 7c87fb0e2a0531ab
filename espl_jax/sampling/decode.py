"""The device side of sampling: prefill, jitted chunks of decode steps, and moving rows between slots.

Each stage of sampling allocates one KV cache of W slots and updates it in place: rows are admitted into free
slots, moved to the first slots when few rows remain, and extended. The cache is never copied as a whole. A
chunk reads only the slots and columns in use. On a mesh, the slots are split into equal shards, one for each
group of devices that shares rows, and a row never leaves its shard. The host keeps the state of every row and
passes it to each call; see `Rows`.
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
from espl_jax.models.transformer import Level, forward, unembed
from espl_jax.parallel import sharding
from espl_jax.sampling import draw
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation

Slots = tuple[jax.Array, jax.Array]
"""Keys [L, K, W, H, C] and values [L, K, W, C, H] of W slots."""


class Rows(NamedTuple):
    """State of the R rows of a call: those in the first R / shards slots of each shard.

    Attributes:
      lane: int32 [R], index of the system prompt.
      start: int32 [R], position of column 0: where the system prompt ends.
      length: int32 [R], columns filled: the problem and all tokens after it, except `token`. A chunk writes
        after these columns, even for a row that waits.
      token: int32 [R], the last token, whose keys and values are not in the cache yet.
      position: int32 [R], tokens since the prompt; folded into the key to sample the next token.
      limit: int32 [R], the row ends when `position` reaches it; slots with nothing to decode have
        limit <= position.
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
    """Tokens sampled by one chunk.

    Attributes:
      tokens: int32 [R, steps], valid in the first `count` columns.
      logprobs: float32 [R, steps], under the sampling distribution (after truncation).
      untruncated_logprobs: float32 [R, steps], under softmax(logits / temperature).
      cutoffs: float32 [R, steps], untruncated logprob below which tokens were cut.
      count: int32 [R], tokens sampled for each row.
      stopped: bool [R], whether the row sampled a stop token.
      steps: int32 [], decode steps run.
      routing: int32 [R, steps, L, A], experts that the routers chose for the token that was fed to draw each
        token; None if not recorded.
    """

    tokens: jax.Array
    logprobs: jax.Array
    untruncated_logprobs: jax.Array
    cutoffs: jax.Array
    count: jax.Array
    stopped: jax.Array
    steps: jax.Array
    routing: jax.Array | None = None


def abstract_slots(
    decoder: DecoderConfig, slots: int, capacity: int, mesh: Mesh | None, everywhere: bool = False
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of slots with `capacity` columns each: sharded by rows, or replicated over
    rows (`everywhere`) like the caches of shared levels."""
    heads, of_key, of_value = decoder.cache_shape
    shape = (decoder.num_layers, heads, slots)
    shapes = (*shape, of_key, capacity), (*shape, capacity, of_value)
    key, value = (
        jax.ShapeDtypeStruct(
            shape,
            jnp.dtype(decoder.dtype),
            sharding=None if mesh is None else sharding.cache_sharding(mesh, shape, everywhere),
        )
        for shape in shapes
    )
    return key, value


def abstract_rows(count: int, mesh: Mesh | None) -> Rows:
    """Returns shapes and shardings of the `Rows` of a call."""
    numbers = jax.ShapeDtypeStruct((count,), jnp.int32)
    keys = jax.ShapeDtypeStruct((count, 2), jnp.uint32)
    return sharding.place_rows(Rows._make((*(numbers,) * 6, keys)), mesh)


def reserve(
    decoder: DecoderConfig, slots: int, capacity: int, mesh: Mesh | None, system: KVCache | None = None
) -> Slots:
    """Allocates empty slots with `capacity` columns each.

    If the cache of the system prompts is committed to a device, so are the slots, as they will be when a
    program returns them: jax compiles another program for arrays that are not committed.
    """
    shapes = abstract_slots(decoder, slots, capacity, mesh)
    device = system.key.sharding if system is not None and system.key.committed else None
    key, value = (jnp.zeros(x.shape, x.dtype, device=x.sharding or device) for x in shapes)
    return key, value


@functools.partial(jax.jit, static_argnames=("decoder", "mesh"))
def prefill(
    params: Any,
    decoder: DecoderConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    system: KVCache | None = None,
    *,
    mesh: Mesh | None = None,
) -> KVCache:
    """Returns the KV cache of one shared level.

    Args:
      params: with or without adapters.
      decoder: the model's configuration.
      tokens: int32 [M, S], the system prompts; or [M * P, Q], P problems for each system prompt, each without
        its last token.
      lengths: int32 [M] or [M * P].
      system: cache of the system prompts when `tokens` are problems, else None.
      mesh: the cache is replicated over rows and sharded by heads like the weights.
    """
    cache = forward(params, decoder, tokens, lengths, () if system is None else (system,)).cache
    if mesh is None:
        return cache
    key, value = (
        jax.lax.with_sharding_constraint(x, sharding.cache_sharding(mesh, x.shape, everywhere=True))
        for x in (cache.key, cache.value)
    )
    # The compiler would choose a sharding: programs that take this cache could not be compiled before.
    return KVCache(key, value, *sharding.constrain_everywhere((cache.start, cache.length), mesh))


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
    """Copies problem caches into the slots of newly admitted rows.

    Args:
      slots: donated.
      problems: cache of a block of problems with Q columns, at most the columns of a slot.
      nodes: int32 [shards, k], index of the problem for each copy.
      into: int32 [shards, k], target slot within the shard.
      count: int32 [shards], how many of the k copies to make.
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
    """Copies slots to other slots of the same shard, one at a time.

    Args:
      slots: donated.
      source, target: int32 [shards, k], slots within the shard.
      count: int32 [shards], how many of the k copies to make.
    """

    def local(slots: Slots, source: jax.Array, target: jax.Array, count: jax.Array) -> Slots:
        # One write per read: swapping two slots would make XLA keep a copy of all slots.
        def put(i: jax.Array, slots: Slots) -> Slots:
            return _write(slots, _row(slots, source[0, i]), target[0, i], 0)

        return jax.lax.fori_loop(0, count[0], put, slots)

    return sharding.over_parts(local, mesh, ("slots", "rows", "rows", "rows"), "slots")(
        slots, source, target, count
    )


@functools.partial(jax.jit, static_argnames=("decoder", "columns", "mesh"), donate_argnames="slots")
def extend(
    params: Any,
    decoder: DecoderConfig,
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
    """Prefills given tokens at the end of some rows, such as the answer of an environment.

    Args:
      params: with or without adapters.
      decoder: the model's configuration.
      system: cache of the system prompts, M nodes.
      slots: donated; the slots of these rows have at least T free columns.
      at: int32 [shards, k], the slots of the rows within their shards.
      rows: [shards * k], the k rows of each shard; only `lane`, `start` and `length` are read.
      tokens: int32 [shards * k, T], the tokens after the filled columns: each row's `token`, then new ones;
        or, for an empty slot, the row from its prompt on.
      lengths: int32 [shards * k], number of tokens; 0 leaves the slot unchanged.
      columns: how many columns of each slot are attended to; at least the longest `rows.length`.
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
    new = forward(params, decoder, tokens, lengths, (owned, own)).cache
    kinds = ("slots", "slots", "rows", "rows", "rows")
    return sharding.over_parts(put_back, mesh, kinds, "slots")(
        slots, (new.key, new.value), at, rows.length, lengths
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        *("decoder", "columns", "steps", "greedy", "truncation", "aligned", "record_routing", "mesh"),
    ),
    donate_argnames="slots",
)
def decode_chunk(
    params: Any,
    decoder: DecoderConfig,
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
    record_routing: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Slots, Drawn]:
    """Runs up to `steps` decode steps for every row; stops early when all rows are done.

    The loop only reads the slots. New keys and values go to a staging buffer, one column per step, which is
    written once per step for all layers and folded into the slots at the end of the chunk.

    Args:
      params: with or without adapters.
      decoder: the model's configuration.
      system: cache of the system prompts, M nodes, read once for all rows.
      slots: donated; every slot has at least `steps` free columns.
      rows: the state of R rows.
      stop_ids: int32 [any]; a row ends after sampling one of these, and keeps the token.
      temperature: float32 []; unused when greedy.
      allowed: uint32 [R, ceil(V / 32)], bit mask of the tokens that each row may sample (see `Constraint`);
        None allows all. Probabilities are renormalized over the allowed tokens. Requires `steps=1`.
      columns: how many columns of each slot are attended to; at least the longest `rows.length`.
      steps: most decode steps of the chunk.
      greedy: take the most likely token instead of sampling.
      truncation: top-k, top-p, min-p.
      aligned: rows are ordered by lane, with equally many for each. The attention then compares a system
        prompt with its own rows only; otherwise with all rows, which needs the same memory traffic but M
        times the arithmetic.
      record_routing: record the choices of experts; requires a model with experts.
      mesh: the mesh that the slots are sharded over, or None.

    Returns:
      (slots, drawn): the updated slots, and the sampled tokens in `steps` columns.

    Raises:
      ValueError: if `allowed` is given and `steps` is not 1.
    """
    if allowed is not None and steps != 1:
        raise ValueError(f"steps={steps}: `allowed` is valid for a single step; pass steps=1")
    count = rows.token.shape[0]
    shards = sharding.row_shards(mesh)
    held = RowsView(*slots, rows.start, rows.length, columns, shards)
    system = system if aligned else dataclasses.replace(system, owner=rows.lane)
    heads, of_key, of_value = decoder.cache_shape
    shape = (decoder.num_layers, heads, count)
    staging = (
        jnp.zeros((*shape, of_key, steps), decoder.dtype),
        jnp.zeros((*shape, steps, of_value), decoder.dtype),
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
        jnp.zeros((count, steps, *decoder.routing_shape), jnp.int32) if record_routing else None,
    )

    def proceed(carry):
        _, _, done, drawn = carry
        return (drawn.steps < steps) & ~done.all()

    def body(carry):
        (key, value), token, done, drawn = carry
        step = drawn.steps
        staged = KVCache(key, value, held.end, jnp.full(count, step, jnp.int32))
        level = forward(params, decoder, token[:, None], ancestors=(system, held, staged))
        # Sampling is sharded by rows, however the head's matmul was sharded.
        logits = unembed(params, decoder, level.hidden[:, 0])
        logits = sharding.constrain(logits, ("rows", "vocab"), decoder.phase)
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
            for old, x, axis in zip((key, value), (level.cache.key, level.cache.value), (4, 3), strict=True)
        )

        def put(column: jax.Array, x: jax.Array) -> jax.Array:
            live = jnp.where(done.reshape(-1, *(1,) * (x.ndim - 1)), 0, x)
            return jax.lax.dynamic_update_slice_in_dim(column, live[:, None], step, axis=1)

        def chosen(level: Level) -> jax.Array:
            """Returns the experts of each row, [R, L, A]."""
            assert level.routing is not None
            return level.routing.choices[:, :, 0].swapaxes(0, 1)

        stop = ~done & (token[:, None] == stop_ids).any(axis=1)
        drawn = Drawn(
            put(drawn.tokens, token),
            put(drawn.logprobs, logprob),
            put(drawn.untruncated_logprobs, untruncated),
            put(drawn.cutoffs, cutoff),
            drawn.count + ~done,
            drawn.stopped | stop,
            step + 1,
            put(drawn.routing, chosen(level)) if record_routing else None,
        )
        done = done | stop | (rows.position + drawn.count >= rows.limit)
        return staging, token, done, drawn

    carry = (staging, rows.token, rows.position >= rows.limit, drawn)
    staging, _, _, drawn = jax.lax.while_loop(proceed, body, carry)

    def fold(slots: Slots, staging: Slots, length: jax.Array) -> Slots:
        # Row by row, in place: a single scatter for all rows would copy the caches.
        def put(row: jax.Array, slots: Slots) -> Slots:
            return _write(slots, _row(staging, row), row, length[row])

        return jax.lax.fori_loop(0, length.shape[0], put, slots)

    folded = sharding.over_parts(fold, mesh, ("slots", "slots", "rows"), "slots")(slots, staging, rows.length)
    # Replicated: every process reads all sampled tokens and makes the same scheduling decisions.
    return folded, sharding.constrain_everywhere(drawn, mesh)


def _row(arrays: Slots, row: jax.Array) -> Slots:
    """Returns the keys and values of one node, [L, K, 1, H, C] and [L, K, 1, C, H]."""
    key, value = (jax.lax.dynamic_slice_in_dim(x, row, 1, axis=2) for x in arrays)
    return key, value


def _write(slots: Slots, new: Slots, slot: jax.Array, column: jax.Array | int) -> Slots:
    """Writes the columns of one row, starting at `column`; in place if the slots are donated."""
    (key, value), (new_key, new_value) = slots, new
    return (
        jax.lax.dynamic_update_slice(key, new_key, (0, 0, slot, 0, column)),
        jax.lax.dynamic_update_slice(value, new_value, (0, 0, slot, column, 0)),
    )
