"""The device side of sampling: prefill, a jitted chunk of decode steps, and rearranging of rows.

One lane per system prompt shares that prompt's cache; a lane's rows are independent, each with a cache of
its own that begins with its problem. Rows are stored flat, lane by lane: [M * R].
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from espl_jax.models.attention import KVCache
from espl_jax.models.config import DecoderConfig
from espl_jax.models.transformer import forward, unembed
from espl_jax.sampling import draw


@struct.dataclass
class Rows:
    """The rows in flight, R of them over all lanes.

    Attributes:
      cache: KVCache with R nodes; a row's problem, then what it has drawn, but for `token`.
      token: int32 [R], the last token, which no cache holds yet.
      drawn: int32 [R], new tokens so far.
      limit: int32 [R], new tokens allowed.
      key: uint32 [R, 2], key data; the token at position t is drawn with t folded in.
      done: bool [R].
    """

    cache: KVCache
    token: jax.Array
    drawn: jax.Array
    limit: jax.Array
    key: jax.Array
    done: jax.Array


class Drawn(NamedTuple):
    """What one chunk drew.

    Attributes:
      tokens: int32 [R, steps], valid in the first `count` columns.
      logprobs: float32 [R, steps], under the distribution drawn from.
      untruncated_logprobs: float32 [R, steps], under softmax(logits / temperature).
      count: int32 [R].
      stopped: bool [R], whether the row drew a stop token.
    """

    tokens: jax.Array
    logprobs: jax.Array
    untruncated_logprobs: jax.Array
    count: jax.Array
    stopped: jax.Array


@functools.partial(jax.jit, static_argnames="config")
def prefill(
    params: Any,
    config: DecoderConfig,
    system_tokens: jax.Array,
    system_lengths: jax.Array,
    problem_tokens: jax.Array,
    problem_lengths: jax.Array,
) -> tuple[KVCache, KVCache]:
    """Caches of the two shared levels.

    Args:
      params: with adapters or not.
      config: the decoder.
      system_tokens: int32 [M, S]; system_lengths: int32 [M].
      problem_tokens: int32 [M * B, Q], without each prompt's last token; problem_lengths: int32 [M * B].
    """
    levels, lengths = (system_tokens, problem_tokens), (system_lengths, problem_lengths)
    _, caches = forward(params, config, levels, lengths)
    return caches


@functools.partial(jax.jit, static_argnames="capacity")
def admit(
    problems: KVCache, nodes: jax.Array, token: jax.Array, limit: jax.Array, key: jax.Array, *, capacity: int
) -> Rows:
    """New rows that begin where their problem's cache ends.

    Args:
      problems: the problem level's caches.
      nodes: int32 [R], each row's node in `problems`.
      token: int32 [R], the last token of each row's prompt.
      limit: int32 [R], new tokens allowed; key: uint32 [R, 2].
      capacity: columns of the rows' caches.
    """
    return Rows(
        _take(problems, nodes, capacity),
        token,
        jnp.zeros_like(token),
        limit,
        key,
        jnp.zeros(token.shape, bool),
    )


@functools.partial(jax.jit, static_argnames="capacity")
def rearrange(rows: Rows, admitted: Rows | None, order: jax.Array, live: jax.Array, *, capacity: int) -> Rows:
    """Drops, moves and adds rows, and changes the capacity of their caches.

    Args:
      rows: R rows; admitted: more rows that join behind them, with the same capacity, or None.
      order: int32 [R'], where each new slot's row comes from, counted over `rows` and then `admitted`.
      live: bool [R'], False for slots that stay empty.
      capacity: columns of the result.
    """
    if admitted is not None:
        # Keys and values have their rows on the third axis, everything else on the first.
        rows = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2 if x[0].ndim == 5 else 0), rows, admitted)
    cache = _take(rows.cache, order, capacity)
    token, drawn, limit, key = (x[order] for x in (rows.token, rows.drawn, rows.limit, rows.key))
    return Rows(cache, token, drawn, limit, key, rows.done[order] | ~live)


def _take(cache: KVCache, nodes: jax.Array, capacity: int) -> KVCache:
    """Nodes of a cache, cut or padded to a capacity that holds what is filled."""

    def columns(x: jax.Array) -> jax.Array:
        x = x[:, :, :, :capacity][:, :, nodes]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, capacity - x.shape[3]), (0, 0)))

    return KVCache(columns(cache.key), columns(cache.value), cache.start[nodes], cache.length[nodes])


@functools.partial(jax.jit, static_argnames=("config", "steps", "greedy"), donate_argnames="rows")
def decode_chunk(
    params: Any,
    config: DecoderConfig,
    system: KVCache,
    rows: Rows,
    stop_ids: jax.Array,
    temperature: jax.Array,
    *,
    steps: int,
    greedy: bool,
) -> tuple[Rows, Drawn]:
    """Up to `steps` tokens for every row; ends early when all rows are done.

    Inside the loop the rows' caches are only read. New keys and values go to a staging buffer with one column
    a step for all rows, written once for all layers, and are folded into the rows' caches at the end.

    Args:
      params: with adapters or not.
      config: the decoder.
      system: cache of the system prompts, M nodes; M divides the number of rows.
      rows: donated. Every cache has `steps` free columns.
      stop_ids: int32 [any]; drawing one of them ends a row, the token included.
      temperature: float32 []; unused when greedy.
      steps: columns of the chunk.
      greedy: take the most likely token instead of drawing.

    Returns:
      (rows, what was drawn, in `steps` columns).
    """
    count = rows.token.shape[0]
    shape = (config.num_layers, config.num_kv_heads, count, steps, config.head_dim)
    staging = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
    drawn = Drawn(
        jnp.zeros((count, steps), jnp.int32),
        jnp.zeros((count, steps), jnp.float32),
        jnp.zeros((count, steps), jnp.float32),
        jnp.zeros(count, jnp.int32),
        jnp.zeros(count, bool),
    )

    def proceed(carry):
        step, _, _, done, _ = carry
        return (step < steps) & ~done.all()

    def body(carry):
        step, staging, token, done, drawn = carry
        staged = KVCache(*staging, rows.cache.end, jnp.full(count, step, jnp.int32))
        hidden, new = forward(params, config, token[:, None], ancestors=(system, rows.cache, staged))
        logits = unembed(params, config, hidden[:, 0])
        if greedy:
            token, untruncated = draw.greedy(logits)
            logprob = jnp.zeros_like(untruncated)
        else:
            uniform = draw.uniforms(rows.key, rows.drawn + step)
            token, logprob = draw.draw(logits, uniform, temperature)
            untruncated = logprob
        staging = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, x, step, axis=3)
            for old, x in zip(staging, (new.key, new.value), strict=True)
        )

        def put(column: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(column, jnp.where(done, 0, x)[:, None], step, axis=1)

        stop = ~done & (token[:, None] == stop_ids).any(axis=1)
        drawn = Drawn(
            put(drawn.tokens, token),
            put(drawn.logprobs, logprob),
            put(drawn.untruncated_logprobs, untruncated),
            drawn.count + ~done,
            drawn.stopped | stop,
        )
        done = done | stop | (rows.drawn + drawn.count >= rows.limit)
        return step + 1, staging, token, done, drawn

    carry = (jnp.int32(0), staging, rows.token, rows.done, drawn)
    _, staging, _, done, drawn = jax.lax.while_loop(proceed, body, carry)
    last = jnp.take_along_axis(drawn.tokens, jnp.maximum(drawn.count - 1, 0)[:, None], axis=1)[:, 0]
    rows = Rows(
        _fold(rows.cache, staging, drawn.count),
        jnp.where(drawn.count > 0, last, rows.token),
        rows.drawn + drawn.count,
        rows.limit,
        rows.key,
        done,
    )
    return rows, drawn


def _fold(cache: KVCache, staging: tuple[jax.Array, jax.Array], count: jax.Array) -> KVCache:
    """Moves the staging buffer behind each row's filled columns; only `count` of them become valid."""

    def put_row(row: jax.Array, columns: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        where = (0, 0, row, cache.length[row], 0)
        return tuple(
            jax.lax.dynamic_update_slice(old, jax.lax.dynamic_slice_in_dim(new, row, 1, axis=2), where)
            for old, new in zip(columns, staging, strict=True)
        )

    # Row by row and in place: one scatter for all rows would copy the caches.
    key, value = jax.lax.fori_loop(0, count.shape[0], put_row, (cache.key, cache.value))
    return KVCache(key, value, cache.start, cache.length + count)
