"""The order of training problems: endless shuffled epochs, resumable from a seed and a position."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from espl_jax.data.problems import ProblemSet
from espl_jax.types import Problem


@dataclasses.dataclass(frozen=True)
class Cursor:
    """A position in the sequence of problems.

    Attributes:
      seed: seed of all shuffles.
      position: problems drawn so far, over all epochs.
    """

    seed: int
    position: int = 0


def next_batch(
    problem_set: ProblemSet, cursor: Cursor, batch_size: int
) -> tuple[tuple[Problem, ...], Cursor]:
    """Draws the next problems.

    Every epoch is a new permutation of the set. A batch may span two epochs; it still has no repeated
    problem, because the new epoch begins with problems that are not in the batch yet.

    Args:
      problem_set: the problems to draw from.
      cursor: the position to start at; initially `Cursor(seed)`.
      batch_size: B. Epochs are complete only if it stays the same throughout a run.

    Returns:
      (problems, the cursor after them). Deterministic.

    Raises:
      ValueError: if the batch is larger than the set, or smaller than 1.
    """
    size = len(problem_set)
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size={batch_size}: {problem_set.name} has {size} problems; choose 1 to {size}, or give "
            "more problems"
        )
    offset = cursor.position % batch_size
    drawn = []
    for position in range(cursor.position, cursor.position + batch_size):
        epoch, place = divmod(position, size)
        drawn.append(problem_set.problems[_order(size, cursor.seed, batch_size, offset, epoch)[place]])
    return tuple(drawn), Cursor(cursor.seed, cursor.position + batch_size)


@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int, batch_size: int, offset: int, epoch: int) -> tuple[int, ...]:
    """Returns the permutation of an epoch; batches start at positions equal to `offset` mod `batch_size`."""

    def begun(epoch: int) -> int:
        """Returns how many problems of the batch at the start of an epoch come from the previous epoch."""
        return (epoch * size - offset) % batch_size if epoch else 0

    # An epoch depends on the previous one only if a batch spans both.
    first = epoch
    while begun(first):
        first -= 1
    order: list[int] = []
    for e in range(first, epoch + 1):
        taken = set(order[len(order) - begun(e) :])
        shuffled = np.random.default_rng([seed, e]).permutation(size).tolist()
        head = [i for i in shuffled if i not in taken][: batch_size - len(taken)]
        chosen = set(head)
        order = head + [i for i in shuffled if i not in chosen]
    return tuple(order)
