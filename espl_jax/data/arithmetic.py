"""Generated sums of two numbers."""

from __future__ import annotations

import math
import random

from espl_jax.data.problems import ProblemSet
from espl_jax.types import Problem

SPLITS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""Each split's share of all unordered pairs."""


def addition(digits: int, count: int, split: str = "train", seed: int = 0) -> ProblemSet:
    """Sums of two numbers of so many digits ("What is 27 + 58?"), in either order, no pair twice.

    A pair of numbers belongs to one split for good, whatever the seed and the order (3 + 5 and 5 + 3 are one
    pair), so that splits never overlap.

    Args:
      digits: of each number, at least 1; one digit means 0 to 9, two digits 10 to 99.
      count: problems wanted; at most the split's share of the pairs (one digit: 55 pairs, 33, 11 and 11).
      split: `train`, `validation` or `test`.
      seed: chooses pairs, their sequence, and the order of the two numbers.

    Raises:
      ValueError: for an unknown split, or a count that is not at least 1 or more than the split has.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if digits < 1:
        raise ValueError(f"digits={digits} must be at least 1")
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
    """A factor that spreads neighbouring pairs over [0, pairs) evenly: near the golden section, coprime."""
    factor = round(pairs * (math.sqrt(5) - 1) / 2)
    while math.gcd(factor, pairs) != 1:
        factor += 1
    return factor


def _pair(rank: int) -> tuple[int, int]:
    """The unordered pair (low <= high) with this number: (0, 0), (0, 1), (1, 1), (0, 2), ..."""
    high = (math.isqrt(8 * rank + 1) - 1) // 2
    return rank - high * (high + 1) // 2, high
