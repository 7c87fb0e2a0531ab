"""A generated data set of two-number additions."""

from __future__ import annotations

import math
import random

from espl_jax.data.problems import ProblemSet
from espl_jax.types import Problem

SPLITS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""Range of unordered pairs in each split, as fractions of all pairs."""


def addition(digits: int, count: int, split: str = "train", seed: int = 0) -> ProblemSet:
    """Returns problems that add two numbers ("What is 27 + 58?"), without repeated pairs.

    Each unordered pair of numbers (3 + 5 and 5 + 3 are one pair) belongs to the same split for every seed, so
    splits never overlap.

    Args:
      digits: digits of each number, at least 1; one digit means 0 to 9, two digits 10 to 99.
      count: number of problems, at most the pairs in the split (one digit: 33, 11 and 11 of 55 pairs).
      split: `train`, `validation` or `test`.
      seed: determines the pairs, their order, and the order of the two numbers in a pair.

    Raises:
      ValueError: for an unknown split, or a count below 1 or above the pairs in the split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if digits < 1:
        raise ValueError(f"digits={digits}: must be at least 1")
    lowest = 10 ** (digits - 1) if digits > 1 else 0
    numbers = 10**digits - lowest
    pairs = numbers * (numbers + 1) // 2
    start, stop = (round(share * pairs) for share in SPLITS[split])
    if not 1 <= count <= stop - start:
        raise ValueError(
            f"count={count}: the {split} split has {stop - start} of the {pairs} unordered pairs of numbers "
            f"with digits={digits}; choose 1 to {stop - start}, or more digits"
        )
    rng = random.Random(f"addition {split} {seed}")
    unscatter = pow(_scatter(pairs), -1, pairs)
    problems = []
    for place in rng.sample(range(start, stop), count):
        low, high = (lowest + number for number in _pair(place * unscatter % pairs))
        first, second = (low, high) if rng.random() < 0.5 else (high, low)
        text = f"What is {first} + {second}?"
        problems.append(Problem(id=f"addition-{low}+{high}", text=text, answer=str(low + high)))
    return ProblemSet(tuple(problems), f"addition of {digits}-digit numbers ({split})")


def _scatter(pairs: int) -> int:
    """Returns a multiplier coprime to `pairs`, near the golden ratio, which scatters neighbouring pairs."""
    factor = round(pairs * (math.sqrt(5) - 1) / 2)
    while math.gcd(factor, pairs) != 1:
        factor += 1
    return factor


def _pair(rank: int) -> tuple[int, int]:
    """Returns the unordered pair (low <= high) of this rank: (0, 0), (0, 1), (1, 1), (0, 2), ..."""
    high = (math.isqrt(8 * rank + 1) - 1) // 2
    return rank - high * (high + 1) // 2, high
