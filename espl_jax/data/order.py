"""The order in which problems are drawn: shuffled epochs without end, resumable from two numbers."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from espl_jax.data.problems import ProblemSet
from espl_jax.types import Problem


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where drawing stands.

    Attributes:
      seed: of all shuffles.
      position: problems drawn so far, over all epochs.
    """

    seed: int
    position: int = 0


def next_batch(
    problem_set: ProblemSet, cursor: Cursor, batch_size: int
) -> tuple[tuple[Problem, ...], Cursor]:
    """Draws the next problems.

    Every epoch is a new permutation of the set. A batch may span the end of an epoch; it holds no problem
    twice even then, because the new epoch begins with problems that are not in the batch already.

    Args:
      problem_set: what to draw from.
      cursor: where to begin; `Cursor(seed)` at first.
      batch_size: B, the same throughout a run for epochs to be whole.

    Returns:
      (problems, the cursor after them); a function of the arguments alone.

    Raises:
      ValueError: if the batch is larger than the set, or smaller than 1.
    """
    size = len(problem_set)
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size={batch_size} cannot be drawn without repetition from the {size} problems of "
            f"{problem_set.name}; choose 1 to {size}, or give more problems"
        )
    offset = cursor.position % batch_size
    drawn = []
    for position in range(cursor.position, cursor.position + batch_size):
        epoch, place = divmod(position, size)
        drawn.append(problem_set.problems[_order(size, cursor.seed, batch_size, offset, epoch)[place]])
    return tuple(drawn), Cursor(cursor.seed, cursor.position + batch_size)


@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int, batch_size: int, offset: int, epoch: int) -> tuple[int, ...]:
    """The epoch's permutation; batches begin at positions that leave `offset` modulo `batch_size`."""

    def begun(epoch: int) -> int:
        """How many problems of the batch that spans the start of an epoch come from the epoch before."""
        return (epoch * size - offset) % batch_size if epoch else 0

    # An epoch depends on the end of the one before only where a batch spans the two.
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
