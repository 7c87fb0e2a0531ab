"""Drafts of the next tokens, copied from text that resembles what a row has sampled so far.

A draft continues the latest occurrence of the longest n-gram that ends a row (prompt lookup decoding, Saxena
2023; He et al. 2023, arXiv 2311.08252), in the row's own text or in other texts on its problem. No model is
asked. A decode step runs a row's last token and its draft at once and draws a token at each of these
positions, with the random number that belongs to the position. As long as drawn tokens equal the draft, they
are the tokens that would have been drawn one at a time. A draft therefore changes how many tokens a step
draws, and never which ones, whatever it contains.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

NGRAM = 8
"""Longest n-gram that is looked up."""

NOTHING = -1
"""Entry of a text that is no token: the end of a text, or the border between two."""


class Texts(NamedTuple):
    """The texts in which the drafts of R rows are looked up.

    Attributes:
      shared: int32 [B, X], texts on each problem, one after another, the latest last; `NOTHING` between and
        behind them.
      problem: int32 [R], index of each row's problem.
      own: int32 [R, Y], the prompt of a row and all its tokens, then `NOTHING`.
      length: int32 [R], tokens in `own`.
    """

    shared: jax.Array
    problem: jax.Array
    own: jax.Array
    length: jax.Array


def propose(others: jax.Array, own: jax.Array, length: jax.Array, count: int) -> jax.Array:
    """Returns the `count` tokens that are likely to come next in each row.

    The longest match wins; among equally long ones, the latest in the row's own text, then the latest in the
    others.

    Args:
      others: int32 [R, X], other texts for each row; `NOTHING` where there is no token.
      own: int32 [R, Y], the text of each row, then `NOTHING`.
      length: int32 [R], tokens in `own`, at least 1.
      count: number of tokens.

    Returns:
      int32 [R, count]; `NOTHING` for a token that no text provides.
    """
    back = length[:, None] - 1 - jnp.arange(NGRAM)
    last = jnp.where(back >= 0, _take(own, back), NOTHING - 1)  # matches nothing
    (most, place), (own_most, own_place) = (_longest_match(text, last) for text in (others, own))
    following = jnp.arange(count)
    from_others, from_own = (
        _take(others, place[:, None] + following),
        _take(own, own_place[:, None] + following),
    )
    draft = jnp.where((own_most >= most)[:, None], from_own, from_others)
    return jnp.where(jnp.maximum(most, own_most)[:, None] > 0, draft, NOTHING)


def _longest_match(text: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds the longest n-gram that ends a row, with a token after it.

    Args:
      text: int32 [R, C].
      last: int32 [R, NGRAM], the last tokens of the row, the very last first.

    Returns:
      (length, place): int32 [R] each: the number of tokens that match, 0 for none, and the column of the
      token that follows the latest match of that length.
    """
    matched, so_far = jnp.zeros_like(text), True
    for i in range(NGRAM):
        before = jnp.pad(text, ((0, 0), (i + 1, 0)), constant_values=NOTHING)[:, : text.shape[1]]
        so_far &= before == last[:, i : i + 1]
        matched += so_far
    matched = jnp.where(text >= 0, matched, 0)
    columns = text.shape[1]
    best = (matched * columns + jnp.arange(columns)).max(axis=1)
    return best // columns, best % columns


def _take(text: jax.Array, columns: jax.Array) -> jax.Array:
    """Returns tokens at columns of each row, `NOTHING` beyond the end. [R, C], [R, n] -> [R, n]."""
    return jnp.take_along_axis(text, columns, axis=1, mode="fill", fill_value=NOTHING)
