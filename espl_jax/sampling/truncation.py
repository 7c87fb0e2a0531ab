"""Truncated sampling: top-k, top-p and min-p as a single cut-off logit per row.

The vocabulary is never sorted. The kept set is `{v: logits[v] >= cutoff}`, and bisection finds the cut-off.
Each step compares and sums over the blocks of tokens with the largest maxima; all blocks are searched only
for rows that those blocks do not decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK = 64
"""Tokens in a block."""
CANDIDATES = 192
"""Blocks searched first: enough for any kept set of fewer tokens, and for most slightly larger ones."""

# Log probabilities relative to the most likely token:
_FLOOR = -87.0  # exp underflows to about zero in float32
NEGLIGIBLE = -30.0  # a whole vocabulary of such tokens weighs less than the rounding error of the sum

HALVINGS = 40
"""Most bisection steps: enough to shrink any bracket to neighbouring float32 numbers."""


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Truncation of the sampling distribution; a static argument under jit. Falsy if nothing is cut.

    Attributes:
      top_k: keeps the k most likely tokens (Fan et al. 2018, arXiv 1805.04833); 0 keeps all.
      top_p: keeps the smallest set of most likely tokens whose probability, renormalized after top-k, is at
        least p (Holtzman et al. 2020, arXiv 1904.09751); 1 keeps all.
      min_p: keeps tokens at least this likely relative to the most likely one (Nguyen et al. 2024, arXiv
        2407.01082); 0 keeps all.

    Raises:
      ValueError: if a field is out of its range.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k={self.top_k}: give a whole number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a probability above 0, or 1 for all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: give a ratio of at most 1, or 0 for all tokens")

    def __bool__(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


UNTRUNCATED = Truncation()
"""Keeps every token."""


def in_blocks(logits: jax.Array) -> jax.Array:
    """Splits logits into blocks, padded with -inf. [R, V] -> [R, ceil(V / BLOCK), BLOCK]."""
    rows, vocab = logits.shape
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % BLOCK)), constant_values=-jnp.inf)
    return padded.reshape(rows, -1, BLOCK)


def cutoff(logits: jax.Array, temperature: jax.Array | float, truncation: Truncation) -> jax.Array:
    """Returns the cut-off logit of each row: the kept set is exactly `{v: logits[v] >= cutoff}`.

    The cut-off is the midpoint between the least likely kept token and the most likely cut token, so that
    small rounding differences in the logits do not change the kept set. If no float32 is between the two, it
    is the logit of the kept one. Ties with the least likely kept token are kept, and so is the most likely
    token, always.

    Args:
      logits: float32 [R, V].
      temperature: above zero; probabilities are softmax(logits / temperature).
      truncation: applied in the order top-k, top-p over the remaining tokens, min-p.

    Returns:
      float32 [R], in units of the logits; -inf where no token of nonzero probability is cut.
    """
    blocks = in_blocks(logits)
    if not truncation:
        return jnp.full(blocks.shape[0], -jnp.inf, jnp.float32)
    maxima = blocks.max(axis=-1)
    largest = maxima.max(axis=-1)
    total = jnp.exp((blocks - largest[:, None, None]) / temperature).sum(axis=-1).sum(axis=-1)

    def search(blocks: jax.Array, left_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _search(blocks, left_out, largest, total, temperature, truncation)

    def search_all() -> tuple[jax.Array, jax.Array]:
        return search(blocks, jnp.full_like(largest, -jnp.inf))[:2]

    if maxima.shape[1] > CANDIDATES and truncation.top_k <= CANDIDATES:
        tops, places = jax.lax.top_k(maxima, CANDIDATES)
        candidates = jnp.take_along_axis(blocks, places[:, :, None], axis=1, mode="clip")
        # No left-out token exceeds the least of these maxima. (`tops[:, -1]` would make XLA's CPU backend
        # sort all of them.)
        kept, cut, exact = search(candidates, tops.min(axis=1))

        def mend() -> tuple[jax.Array, jax.Array]:
            # Replace only the inexact rows: a row's cut-off must not depend on the other rows of the batch.
            kept_of_all, cut_of_all = search_all()
            return jnp.where(exact, kept, kept_of_all), jnp.where(exact, cut, cut_of_all)

        kept, cut = jax.lax.cond(exact.all(), lambda: (kept, cut), mend)
    else:
        kept, cut = search_all()
    middle = (kept + cut) / 2
    return jnp.where((middle > cut) | (cut == -jnp.inf), middle, kept)


def _search(
    blocks: jax.Array,
    left_out: jax.Array,
    largest: jax.Array,
    total: jax.Array,
    temperature: jax.Array | float,
    truncation: Truncation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the logits of the least likely kept token and of the most likely cut token.

    Args:
      blocks: float32 [R, C, BLOCK], logits, including the largest of each row.
      left_out: float32 [R], an upper bound on the logits that are not in the blocks; -inf if all are.
      largest: float32 [R], the largest logit.
      total: float32 [R], sum over the vocabulary of exp((logit - largest) / temperature).
      temperature, truncation: see `cutoff`.

    Returns:
      (kept, cut, exact): float32 [R] logits, with `cut` -inf where nothing is cut; and bool [R], False where
      a left-out token might have to be kept.
    """
    probs = jnp.exp((blocks - largest[:, None, None]) / temperature)
    outside = (left_out - largest) / temperature

    def above(bound: jax.Array, values: jax.Array | float) -> jax.Array:
        return jnp.where(probs >= jnp.exp(bound)[:, None, None], values, 0.0)

    def held(values: jax.Array) -> jax.Array:
        return values.sum(axis=1).sum(axis=1)

    bound, exact = jnp.maximum(outside, _FLOOR), True
    if truncation.top_k:
        wanted = jnp.full_like(bound, truncation.top_k)
        bound = _bisect(lambda bound: held(above(bound, 1.0)), wanted, jnp.ones_like, bound)
        exact, total = bound > outside, held(above(bound, probs))
    if truncation.top_p < 1:
        low = jnp.maximum(bound, NEGLIGIBLE)
        bound = _bisect(lambda bound: held(above(bound, probs)), truncation.top_p * total, jnp.exp, low)
    # Relative probabilities are at most 1, so the most likely token is kept however the bound was rounded.
    least = jnp.minimum(jnp.maximum(jnp.exp(bound), truncation.min_p), 1.0)
    kept = jnp.where(probs >= least[:, None, None], blocks, jnp.inf).min(axis=1).min(axis=1)
    cut = jnp.where(blocks >= kept[:, None, None], -jnp.inf, blocks).max(axis=1).max(axis=1)
    return kept, jnp.maximum(cut, left_out), exact & (least > jnp.exp(outside))


def _bisect(
    measure: Callable[[jax.Array], jax.Array],
    wanted: jax.Array,
    unit: Callable[[jax.Array], jax.Array],
    low: jax.Array,
) -> jax.Array:
    """Returns the largest bound at which enough is kept, or one that keeps the same tokens; else `low`.

    Args:
      measure: bound [R] -> [R], the mass (or number) of the tokens at or above it.
      wanted: float32 [R], the least mass to keep.
      unit: bound [R] -> [R], the least mass of a single token at or above it.
      low: float32 [R], lower end of the search; the upper end is 0, the most likely token.
    """

    def decided(low, high, held, held_high):
        # Every kept token is needed, or at most one token is between the bounds.
        return (held - wanted < unit(low)) | (held - held_high < 2 * unit(low)) | (low >= high)

    def undecided(state):
        step, *bracket = state
        return (step < HALVINGS) & ~decided(*bracket).all()

    def halve(state):
        step, low, high, held, held_high = state
        middle = (low + high) / 2
        measured = measure(middle)
        # Decided rows do not change while other rows are still being searched.
        open_ = ~decided(low, high, held, held_high)
        raised, lowered = open_ & (measured >= wanted), open_ & (measured < wanted)
        return (
            step + 1,
            jnp.where(raised, middle, low),
            jnp.where(lowered, middle, high),
            jnp.where(raised, measured, held),
            jnp.where(lowered, measured, held_high),
        )

    high = jnp.zeros_like(low)
    held_high = unit(high)
    low = jnp.where(held_high >= wanted, high, low)
    state = 0, low, high, measure(low), held_high
    return jax.lax.while_loop(undecided, halve, state)[1]
