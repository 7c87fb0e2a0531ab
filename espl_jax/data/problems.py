"""Problem sets, and keeping them apart."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from espl_jax.types import Problem


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """Problems in a fixed order.

    Attributes:
      problems: at least one; their ids are distinct.
      name: whence they come, for messages and reports.

    Raises:
      ValueError: for an empty set, or an id that occurs twice.
    """

    problems: tuple[Problem, ...]
    name: str

    def __post_init__(self):
        if not self.problems:
            raise ValueError(f"{self.name} has no problems; give it at least one")
        seen = set()
        for problem in self.problems:
            if problem.id in seen:
                raise ValueError(f"{self.name}: the id {problem.id!r} occurs twice; make ids distinct")
            seen.add(problem.id)

    def __len__(self) -> int:
        return len(self.problems)


def hold_out(problem_set: ProblemSet, count: int, seed: int) -> tuple[ProblemSet, ProblemSet]:
    """Takes a validation set out of a problem set.

    Args:
      problem_set: what to divide.
      count: problems held out, at least one and fewer than all.
      seed: chooses them.

    Returns:
      (train, validation), both in the order of the set.

    Raises:
      ValueError: if `count` leaves nothing on either side.
    """
    if not 0 < count < len(problem_set):
        raise ValueError(
            f"cannot hold out count={count} of the {len(problem_set)} problems of {problem_set.name}; "
            f"choose 1 to {len(problem_set) - 1}"
        )
    chosen = set(np.random.default_rng(seed).permutation(len(problem_set))[:count].tolist())
    parts: tuple[list[Problem], list[Problem]] = ([], [])
    for i, problem in enumerate(problem_set.problems):
        parts[i in chosen].append(problem)
    train, validation = (tuple(part) for part in parts)
    return ProblemSet(train, problem_set.name), ProblemSet(validation, f"{problem_set.name} (held out)")


def check_disjoint(**splits: ProblemSet) -> None:
    """Checks that no problem is in two splits, by its id or by its text (case and white space apart).

    Raises:
      ValueError: naming the problem and the two splits.
    """
    for (one, ones), (other, others) in itertools.combinations(splits.items(), 2):
        known = {key: problem for problem in ones.problems for key in _identities(problem)}
        for problem in others.problems:
            for key in _identities(problem):
                if key in known:
                    raise ValueError(
                        f"problem {problem.id!r} of {other} ({others.name}) has the same {key[0]} as "
                        f"{known[key].id!r} of {one} ({ones.name}); remove it from one of them"
                    )


def _identities(problem: Problem) -> tuple[tuple[str, str], ...]:
    return ("id", problem.id), ("text", " ".join(problem.text.split()).casefold())
