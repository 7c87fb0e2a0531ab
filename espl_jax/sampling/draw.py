"""Samples one token per row, with a random number that depends only on the row and its position."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from espl_jax.sampling.truncation import BLOCK, NEGLIGIBLE, UNTRUNCATED, Truncation, cutoff, in_blocks

_SMALLEST_UNIFORM = 2.0**-24
"""Half the step between float32 uniforms. A uniform of 0 represents the whole interval up to the next value;
used as an exact 0, it would always select the first token, however unlikely."""


@jax.jit
def row_keys(key: jax.Array, *words: jax.Array) -> jax.Array:
    """Derives one key per row by folding words into `key`, so that samples do not change with batch layout.

    Args:
      key: one typed threefry key, not consumed.
      *words: uint32 arrays that broadcast to one shape, e.g. iteration [], prompt [M, 1, 1], sample [N].

    Returns:
      uint32 [..., 2], raw key data of the broadcast shape.
    """
    spread = jnp.broadcast_arrays(*(jnp.asarray(word, jnp.uint32) for word in words))
    flat = jnp.stack([word.reshape(-1) for word in spread], axis=-1)

    def fold(row: jax.Array) -> jax.Array:
        folded, _ = jax.lax.scan(lambda k, word: (jax.random.fold_in(k, word), None), key, row)
        return jax.random.key_data(folded)

    return jax.vmap(fold)(flat).reshape(*spread[0].shape, 2)


def uniforms(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns a uniform for each row's position. uint32 [R, 2], int32 [R] -> float32 [R] in [0, 1)."""

    def one(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(
            jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        )

    return jax.vmap(one)(keys, positions)


class Draw(NamedTuple):
    """One sampled token per row.

    Attributes:
      token: int32 [R].
      logprob: float32 [R], of the token under the sampling distribution (after truncation).
      untruncated_logprob: float32 [R], of the token under softmax(logits / temperature).
      cutoff: float32 [R], untruncated logprob below which tokens were cut; -inf where nothing was cut.
    """

    token: jax.Array
    logprob: jax.Array
    untruncated_logprob: jax.Array
    cutoff: jax.Array


def only_allowed(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Returns the logits, with -inf for every token that a row may not sample.

    Args:
      logits: float32 [R, V].
      allowed: uint32 [R, ceil(V / 32)]; token v is bit v % 32 of word v // 32.
    """
    chex.assert_rank(logits, 2)
    chex.assert_shape(allowed, (len(logits), -(-logits.shape[1] // 32)))
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return jnp.where(bits.reshape(len(allowed), -1)[:, : logits.shape[1]] > 0, logits, -jnp.inf)


def draw(
    logits: jax.Array,
    uniform: jax.Array,
    temperature: jax.Array | float,
    truncation: Truncation = UNTRUNCATED,
) -> Draw:
    """Samples from softmax(logits / temperature), truncated, by inverse transform sampling.

    The search over the cumulative distribution has two levels, blocks of tokens and then tokens within a
    block. It is cheap next to the head's matmul and needs one random number per row; the Gumbel trick would
    need one per token of the vocabulary.

    Tokens e^30 times less likely than the most likely one are never sampled: all of them together weigh less
    than the rounding error of the sum, so only rounding could select them.

    Args:
      logits: float32 [R, V]; a token with -inf is never sampled.
      uniform: float32 [R] in [0, 1), multiples of 2^-23; 0 counts as 2^-24.
      temperature: above zero.
      truncation: top-k, top-p, min-p.
    """
    chex.assert_rank(logits, 2)
    chex.assert_shape(uniform, logits.shape[:1])
    blocks = in_blocks(logits)
    largest = blocks.max(axis=-1).max(axis=-1)[:, None, None]
    least = cutoff(logits, temperature, truncation)[:, None, None]

    def scores(logits: jax.Array) -> jax.Array:
        return (logits - largest) / temperature

    def weights(logits: jax.Array) -> jax.Array:
        logs = scores(logits)
        return jnp.where((logits >= least) & (logs >= NEGLIGIBLE), jnp.exp(logs), 0.0)

    sums = weights(blocks).sum(axis=-1)
    below = jnp.cumsum(sums, axis=-1)
    target = jnp.maximum(uniform, _SMALLEST_UNIFORM) * below[:, -1]
    block = _first_past(target, sums, below)
    before = jnp.where(
        block > 0, jnp.take_along_axis(below, jnp.maximum(block - 1, 0)[:, None], axis=-1)[:, 0], 0.0
    )
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)
    inside_weights = weights(inside)[:, 0]
    # Offset by the blocks before, so that these sums are rounded to the same precision as the target.
    inside_sums = before[:, None] + jnp.cumsum(inside_weights, axis=-1)
    place = _first_past(jnp.maximum(target, before), inside_weights, inside_sums)
    score = jnp.take_along_axis(scores(inside)[:, 0], place[:, None], axis=-1)[:, 0]
    normalizer = jnp.log(jnp.exp(scores(blocks)).sum(axis=-1).sum(axis=-1))
    untruncated = score - normalizer
    return Draw(
        token=(block * BLOCK + place).astype(jnp.int32),
        logprob=score - jnp.log(below[:, -1]) if truncation else untruncated,
        untruncated_logprob=untruncated,
        cutoff=scores(least)[:, 0, 0] - normalizer,
    )


def _first_past(target: jax.Array, weights: jax.Array, sums: jax.Array) -> jax.Array:
    """Returns the index of the first running sum above the target. [R], [R, C], [R, C] -> int [R].

    However the target and the sums are rounded, an index with zero weight is never returned. A target at or
    past the largest sum maps to the first index that reaches that sum.
    """
    sums = jnp.where(weights > 0, sums, 0.0)
    target = jnp.minimum(target, jnp.nextafter(sums.max(axis=-1), jnp.float32(0)))
    return jnp.argmax(sums > target[:, None], axis=-1)


def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the most likely token and its logprob under softmax(logits): int32 [R], float32 [R]."""
    chex.assert_rank(logits, 2)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
