"""Drawing one token a row, from a random number that belongs to the row and position alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BLOCK = 128


@jax.jit
def row_keys(key: jax.Array, *words: jax.Array) -> jax.Array:
    """Folds words into a key, one key a row, so that a row's draws do not depend on where it is laid out.

    Args:
      key: one typed threefry key, not consumed.
      *words: uint32 arrays that broadcast to one shape, e.g. iteration [], prompt [M, 1, 1], sample [N].

    Returns:
      uint32 [..., 2], raw key data of the broadcast shape.
    """
    words = jnp.broadcast_arrays(*(jnp.asarray(word, jnp.uint32) for word in words))
    flat = jnp.stack([word.reshape(-1) for word in words], axis=-1)

    def fold(row: jax.Array) -> jax.Array:
        folded, _ = jax.lax.scan(lambda k, word: (jax.random.fold_in(k, word), None), key, row)
        return jax.random.key_data(folded)

    return jax.vmap(fold)(flat).reshape(*words[0].shape, 2)


def uniforms(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """The uniform of each row's position. uint32 [R, 2], int32 [R] -> float32 [R] in [0, 1)."""

    def one(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(
            jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        )

    return jax.vmap(one)(keys, positions)


def draw(
    logits: jax.Array, uniform: jax.Array, temperature: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Draws from softmax(logits / temperature) by inverting its distribution function.

    The search runs in two levels, blocks of 128 tokens and then tokens, which costs little beside the head's
    product, where a Gumbel draw would need a random number for every token of the vocabulary.

    Args:
      logits: float32 [R, V].
      uniform: float32 [R] in [0, 1).
      temperature: above zero.

    Returns:
      (token int32 [R], its logprob float32 [R] under the distribution drawn from).
    """
    rows, vocab = logits.shape
    logprobs = jax.nn.log_softmax(logits / temperature, axis=-1)
    padded = jnp.pad(jnp.exp(logprobs), ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    blocks = padded.sum(axis=-1)
    below = jnp.cumsum(blocks, axis=-1)
    target = uniform * below[:, -1]
    block = _first_past(target, blocks, below)
    before = jnp.where(
        block > 0, jnp.take_along_axis(below, jnp.maximum(block - 1, 0)[:, None], axis=-1)[:, 0], 0.0
    )
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    token = block * _BLOCK + _first_past(target - before, inside, jnp.cumsum(inside, axis=-1))
    return token.astype(jnp.int32), jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]


def _first_past(target: jax.Array, weights: jax.Array, sums: jax.Array) -> jax.Array:
    """Index of the first running sum above the target. [R], [R, C], [R, C] -> int [R].

    However target and sums were rounded, an index without weight is never chosen, and a target at or past
    the largest sum belongs to the last likely index.
    """
    sums = jnp.where(weights > 0, sums, 0.0)
    target = jnp.minimum(target, jnp.nextafter(sums.max(axis=-1), jnp.float32(0)))
    return jnp.argmax(sums > target[:, None], axis=-1)


def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most likely token and its logprob under softmax(logits): [R, V] -> int32 [R], float32 [R]."""
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
