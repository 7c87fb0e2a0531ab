"""Chooses how many tokens to draft: more where drafts are often right, and where few rows run."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

CPU_TOKENS = 16
"""Tokens per decode step whose arithmetic takes as long as reading the weights, on a CPU, which does one
after the other. Qwen2.5-Coder-0.5B on two cores with AVX-512 takes 84 ms for 4 tokens, 130 for 20 and 340 for
60."""

ACCELERATOR_TOKENS = 200
"""The same on accelerators, which do both at once. TPUs have 166 (v5p) to 560 (v6e) peak bfloat16 flops per
byte of bandwidth."""

WORTH_IT = 1.2
"""Expected gain in speed below which nothing is drafted."""

DECAY = 0.5
"""Weight of what was counted before a chunk, against the chunk."""

FIRST_RATE, FIRST_RATE_WITH_PAST = 0.4, 0.7
"""Share of drafted tokens that are expected to be drawn before any are counted, without and with earlier
rollouts on the same problems."""

PRIOR = 4.0
"""Drafted tokens that the mean over all rows counts for in the estimate of one row."""


class Acceptance:
    """How often drafted tokens are drawn, by row.

    All counts are numbers of tokens, and nothing is timed: the choices of a resumed run are the same.
    """

    def __init__(self, rows: int, first_rate: float = FIRST_RATE):
        """Begins with this rate."""
        self._hits, self._misses = np.zeros((2, rows))
        self._all = PRIOR * np.array([first_rate, 1.0 - first_rate])

    def add(self, rows: np.ndarray, hits: np.ndarray, misses: np.ndarray) -> None:
        """Counts the drafted tokens of a chunk: drawn, and not drawn. int [R] each."""
        self._hits[rows] = DECAY * self._hits[rows] + hits
        self._misses[rows] = DECAY * self._misses[rows] + misses
        self._all = DECAY * self._all + (hits.sum(), misses.sum())

    def rates(self, rows: np.ndarray) -> np.ndarray:
        """Returns estimates of the probability that a drafted token is drawn. int [R] -> float [R]."""
        hits, misses = self._hits[rows], self._misses[rows]
        mean = (self._all[0] + 0.5) / (self._all.sum() + 1.0)
        return (hits + PRIOR * mean) / (hits + misses + PRIOR)

    def choose(self, rows: np.ndarray, width: int, read: float, lengths: Sequence[int]) -> int:
        """Returns the length of drafts with which the most tokens per unit of time are expected.

        Args:
          rows: int [R], the rows that run.
          width: tokens of a step without drafts for each copy of the weights, idle rows included.
          read: bytes that a step reads, caches included, relative to those of the weights.
          lengths: the possible lengths, 0 among them.
        """
        rates, on_cpu = self.rates(rows), jax.default_backend() == "cpu"

        def speed(length: int) -> float:
            drawn = sum(float((rates**i).sum()) for i in range(length + 1))
            fed = width * (length + 1)
            return drawn / (read + fed / CPU_TOKENS if on_cpu else max(read, fed / ACCELERATOR_TOKENS))

        best = max(lengths, key=speed)
        return best if speed(best) > WORTH_IT * speed(0) else 0
