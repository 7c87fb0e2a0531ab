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

from espl_jax.models.attention import GappedCache, KVCache, RowsView
from espl_jax.models.config import DecoderConfig
from espl_jax.models.transformer import forward, unembed
from espl_jax.parallel import sharding
from espl_jax.sampling import draw
from espl_jax.sampling.drafts import Texts, propose
from espl_jax.sampling.slot_arrays import Slots, restored, row_of, stored, write_row
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation


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
    """Tokens sampled by one chunk, in S = steps * (drafted + 1) columns.

    Attributes:
      tokens: int32 [R, S], valid in the first `count` columns.
      logprobs: float32 [R, S], under the sampling distribution (after truncation).
      untruncated_logprobs: float32 [R, S], under softmax(logits / temperature).
      cutoffs: float32 [R, S], untruncated logprob below which tokens were cut.
      count: int32 [R], tokens sampled for each row.
      stopped: bool [R], whether the row sampled a stop token.
      steps: int32 [], decode steps run.
      hits, misses: int32 [R], drafted tokens that were drawn, and the first ones that were not.
      routing: int32 [R, S, L, A], experts that the routers chose for the token that was fed to draw each
        token; None if not recorded.
    """

    tokens: jax.Array
    logprobs: jax.Array
    untruncated_logprobs: jax.Array
    cutoffs: jax.Array
    count: jax.Array
    stopped: jax.Array
    steps: jax.Array
    hits: jax.Array
    misses: jax.Array
    routing: jax.Array | None = None


def abstract_slots(
    decoder: DecoderConfig, slots: int, capacity: int, mesh: Mesh | None, everywhere: bool = False
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns shapes and shardings of slots with `capacity` columns each: sharded by rows, or replicated over
    rows (`everywhere`) like the caches of shared levels, which are never int8."""
    heads, of_key, of_value = decoder.cache_shape
    shape = (decoder.num_layers, heads, slots)
    rounds = decoder.cache_dtype == "int8" and not everywhere
    dtype = "int8" if rounds else decoder.dtype
    arrays = [((*shape, of_key, capacity), dtype), ((*shape, capacity, of_value), dtype)]
    if rounds:
        arrays += [((*shape, capacity), "float32")] * 2
    return tuple(
        jax.ShapeDtypeStruct(
            shape,
            jnp.dtype(dtype),
            sharding=None if mesh is None else sharding.cache_sharding(mesh, shape, everywhere),
        )
        for shape, dtype in arrays
    )


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
    return tuple(jnp.zeros(x.shape, x.dtype, device=x.sharding or device) for x in shapes)


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
            return write_row(slots, row_of(problems, nodes[0, i]), into[0, i], 0)

        return jax.lax.fori_loop(0, count[0], put, slots)

    over_parts = sharding.over_parts(local, mesh, ("slots", "everywhere", "rows", "rows", "rows"), "slots")
    return over_parts(slots, stored((problems.key, problems.value), slots), nodes, into, count)


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
            return write_row(slots, row_of(slots, source[0, i]), target[0, i], 0)

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
        key, value, *scales = (x[:, :, at[0]] for x in slots)
        return key[..., :columns], value[:, :, :, :columns], *(x[..., :columns] for x in scales)

    def put_back(slots: Slots, new: Slots, at: jax.Array, length: jax.Array, number: jax.Array) -> Slots:
        def put(i: jax.Array, slots: Slots) -> Slots:
            def write(slots: Slots) -> Slots:
                return write_row(slots, row_of(new, i), at[0, i], length[i])

            return jax.lax.cond(number[i] > 0, write, lambda slots: slots, slots)

        return jax.lax.fori_loop(0, count, put, slots)

    gathered = sharding.over_parts(gather, mesh, ("slots", "rows"), "slots")(slots, at)
    key, value = restored(gathered, decoder)
    own = KVCache(key, value, rows.start, rows.length)
    owned = dataclasses.replace(system, owner=rows.lane)
    new = forward(params, decoder, tokens, lengths, (owned, own)).cache
    kinds = ("slots", "slots", "rows", "rows", "rows")
    return sharding.over_parts(put_back, mesh, kinds, "slots")(
        slots, stored((new.key, new.value), slots), at, rows.length, lengths
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        *("decoder", "columns", "steps", "drafted", "greedy", "truncation", "aligned", "record_routing"),
        "mesh",
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
    texts: Texts | None = None,
    *,
    columns: int,
    steps: int,
    drafted: int = 0,
    greedy: bool = False,
    truncation: Truncation = UNTRUNCATED,
    aligned: bool = False,
    record_routing: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Slots, Drawn]:
    """Runs up to `steps` decode steps for every row; stops early when all rows are done.

    A step runs the last token of each row and a draft of `drafted` tokens after it, draws a token at each of
    these positions, and keeps those up to and including the first that differs from the draft (see `drafts`).

    The loop only reads the slots. New keys and values go to a staging buffer, with the same columns for all
    rows: those of draft tokens that were not drawn stay empty. At the end of the chunk, the filled columns
    are folded into the slots.

    Args:
      params: with or without adapters.
      decoder: the model's configuration.
      system: cache of the system prompts, M nodes, read once for all rows.
      slots: donated; every slot has at least S = steps * (drafted + 1) free columns.
      rows: the state of R rows.
      stop_ids: int32 [any]; a row ends after sampling one of these, and keeps the token.
      temperature: float32 []; unused when greedy.
      allowed: uint32 [R, ceil(V / 32)], bit mask of the tokens that each row may sample (see `Constraint`);
        None allows all. Probabilities are renormalized over the allowed tokens. Requires `steps=1` and
        `drafted=0`.
      texts: where drafts are looked up; required for `drafted`. Without drafts, what would have been the
        first token of each is still compared with the token drawn.
      columns: how many columns of each slot are attended to; at least the longest `rows.length`.
      steps: most decode steps of the chunk.
      drafted: tokens of a draft; 0 for none.
      greedy: take the most likely token instead of sampling.
      truncation: top-k, top-p, min-p.
      aligned: rows are ordered by lane, with equally many for each. The attention then compares a system
        prompt with its own rows only; otherwise with all rows, which needs the same memory traffic but M
        times the arithmetic.
      record_routing: record the choices of experts; requires a model with experts.
      mesh: the mesh that the slots are sharded over, or None.

    Returns:
      (slots, drawn): the updated slots, and the sampled tokens in S columns.

    Raises:
      ValueError: if `allowed` is given and `steps` is not 1 or `drafted` not 0, or `drafted` without texts.
    """
    if allowed is not None and (steps, drafted) != (1, 0):
        raise ValueError(
            f"steps={steps}, drafted={drafted}: `allowed` is for a single token; pass steps=1 and drafted=0"
        )
    if drafted and texts is None:
        raise ValueError(f"drafted={drafted}: drafts need texts to be looked up in; pass texts")
    count, fed = rows.token.shape[0], drafted + 1
    shards = sharding.row_shards(mesh)
    key, value, *scales = slots
    held = RowsView(key, value, rows.start, rows.length, columns, shards, tuple(scales) or None)
    system = system if aligned else dataclasses.replace(system, owner=rows.lane)
    heads, of_key, of_value = decoder.cache_shape
    shape, width = (decoder.num_layers, heads, count), steps * fed
    keys_and_values = (
        jnp.zeros((*shape, of_key, width), decoder.dtype),
        jnp.zeros((*shape, width, of_value), decoder.dtype),
    )
    key, value = (sharding.constrain_cache(x, mesh) for x in keys_and_values)
    staging = GappedCache(
        key, value, jnp.zeros((count, width), bool), jnp.zeros((count, width), jnp.int32), held.end
    )
    zeros, none = jnp.zeros((count, width), jnp.float32), jnp.zeros(count, jnp.int32)
    drawn = Drawn(
        jnp.zeros((count, width), jnp.int32),
        zeros,
        zeros,
        zeros,
        none,
        jnp.zeros(count, bool),
        jnp.int32(0),
        none,
        none,
        jnp.zeros((count, width, *decoder.routing_shape), jnp.int32) if record_routing else None,
    )
    offsets = jnp.arange(fed)
    others = None if texts is None else sharding.constrain(texts.shared[texts.problem], _OF_ROWS, "sampling")

    def proceed(carry):
        _, _, done, drawn, _ = carry
        return (drawn.steps < steps) & ~done.all()

    def body(carry):
        staging, token, done, drawn, own = carry
        step, before = drawn.steps, drawn.count
        tokens, draft = token[:, None], None
        if texts is not None and others is not None:
            draft = propose(others, own, texts.length + before, max(drafted, 1))
            tokens = jnp.concatenate([tokens, jnp.maximum(draft[:, :drafted], 0)], axis=1)
        level = forward(params, decoder, tokens, ancestors=(system, held, staging))
        # First sharded like the head, then resharded: every device draws some of the tokens.
        logits = unembed(params, decoder, level.hidden.reshape(count * fed, -1))
        logits = sharding.constrain(logits, ("tokens", "vocab"), decoder.phase)
        logits = sharding.constrain(logits, ("draws", None), decoder.phase)
        if allowed is not None:
            logits = draw.only_allowed(logits, allowed)
        if greedy:
            token, untruncated = draw.greedy(logits)
            logprob, cutoff = jnp.zeros_like(untruncated), jnp.full_like(untruncated, -jnp.inf)
        else:
            positions = (rows.position + before)[:, None] + offsets
            uniform = draw.uniforms(jnp.repeat(rows.key, fed, axis=0), positions.reshape(-1))
            token, logprob, untruncated, cutoff = draw.draw(logits, uniform, temperature, truncation)
        token, logprob, untruncated, cutoff = (
            sharding.constrain(x.reshape(count, fed), _OF_ROWS, decoder.phase)
            for x in (token, logprob, untruncated, cutoff)
        )

        # The tokens up to and including the first that differs from the draft, stops the row, or reaches its
        # limit.
        agrees = token[:, :-1] == tokens[:, 1:]
        goes_on = agrees & ~_among(token[:, :-1], stop_ids)
        kept = 1 + jnp.cumprod(goes_on, axis=1, dtype=jnp.int32).sum(axis=1)
        kept = jnp.minimum(kept, rows.limit - rows.position - before)
        kept = jnp.where(done, 0, kept)
        last = jnp.take_along_axis(token, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
        stop = ~done & _among(last, stop_ids)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return _put(old, new, before, kept)

        hits, misses = drawn.hits, drawn.misses
        if texts is not None and draft is not None:
            matched = jnp.cumprod(token[:, : draft.shape[1]] == draft, axis=1, dtype=jnp.int32).sum(axis=1)
            hits += jnp.minimum(matched, kept)
            misses += ~done & (matched < draft.shape[1])
            own = _put(own, token, texts.length + before, kept)
        filled = offsets < kept[:, None]
        positions = staging.end[:, None] + offsets
        written = (
            (staging.key, level.cache.key, 4),
            (staging.value, level.cache.value, 3),
            (staging.filled, filled, 1),
            (staging.positions, positions, 1),
        )
        key, value, filled, positions = (
            jax.lax.dynamic_update_slice_in_dim(old, x, step * fed, axis) for old, x, axis in written
        )
        staging = GappedCache(key, value, filled, positions, staging.end + kept)
        routing = None
        if record_routing:
            assert level.routing is not None
            routing = put(drawn.routing, jnp.moveaxis(level.routing.choices, 0, 2))
        drawn = Drawn(
            put(drawn.tokens, token),
            put(drawn.logprobs, logprob),
            put(drawn.untruncated_logprobs, untruncated),
            put(drawn.cutoffs, cutoff),
            before + kept,
            drawn.stopped | stop,
            step + 1,
            hits,
            misses,
            routing,
        )
        done = done | stop | (rows.position + drawn.count >= rows.limit)
        return staging, last, done, drawn, own

    carry = (staging, rows.token, rows.position >= rows.limit, drawn, None if texts is None else texts.own)
    staging, _, _, drawn, _ = jax.lax.while_loop(proceed, body, carry)

    def fold(slots: Slots, staged: Slots, length: jax.Array) -> Slots:
        # Row by row, in place: a single scatter for all rows would copy the caches.
        def put(row: jax.Array, slots: Slots) -> Slots:
            return write_row(slots, row_of(staged, row), row, length[row])

        return jax.lax.fori_loop(0, length.shape[0], put, slots)

    staged = stored(_without_gaps(staging) if drafted else (staging.key, staging.value), slots)
    folded = sharding.over_parts(fold, mesh, ("slots", "slots", "rows"), "slots")(slots, staged, rows.length)
    # Replicated: every process reads all sampled tokens and makes the same scheduling decisions.
    return folded, sharding.constrain_everywhere(drawn, mesh)


_OF_ROWS = ("rows", None)
"""Logical axes of an array with one line per row."""


def _among(tokens: jax.Array, stop_ids: jax.Array) -> jax.Array:
    """Returns which tokens are stop tokens. int32 [...] -> bool [...]."""
    return (tokens[..., None] == stop_ids).any(axis=-1)


def _put(old: jax.Array, new: jax.Array, column: jax.Array, count: jax.Array) -> jax.Array:
    """Writes the first `count` entries of each row from its `column` on.

    Without a scatter, which TPUs run entry by entry: the few new columns are selected one after another.

    Args:
      old: [R, C, ...].
      new: [R, n, ...].
      column, count: int32 [R].
    """
    place = jnp.arange(old.shape[1]) - column[:, None]
    place = jnp.where(place < count[:, None], place, -1).reshape(*place.shape, *(1,) * (old.ndim - 2))
    for i in range(new.shape[1]):
        old = jnp.where(place == i, new[:, i : i + 1], old)
    return old


def _without_gaps(staging: GappedCache) -> Slots:
    """Moves the filled columns of every row to the front, in order. Columns behind them become zero.

    As a product with a matrix of zeros and ones, which is exact; TPUs are slow to gather columns.
    """
    columns = jnp.arange(staging.filled.shape[1])
    place = jnp.cumsum(staging.filled, axis=1) - 1
    moves = staging.filled[:, :, None] & (place[:, :, None] == columns)  # [R, from, to]

    def moved(spec: str, x: jax.Array) -> jax.Array:
        return jnp.einsum(spec, x, moves.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)

    return moved("lkrhc,rct->lkrht", staging.key), moved("lkrch,rct->lkrth", staging.value)
