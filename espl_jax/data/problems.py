"""Problem sets, and keeping them apart."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from espl_jax.data.statements import comparable
from espl_jax.types import Problem

_Keys = tuple[tuple[str, str], ...]


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

    Of statements that `statements.comparable` cannot tell apart none is held out.

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
    texts = [comparable(problem.text) for problem in problem_set.problems]
    copies = collections.Counter(texts)
    order = np.random.default_rng(seed).permutation(len(problem_set)).tolist()
    chosen = set([i for i in order if copies[texts[i]] == 1][:count])
    if len(chosen) < count:
        raise ValueError(
            f"cannot hold out count={count} problems of {problem_set.name}: only {len(chosen)} of its "
            "statements are there once; choose at most so many"
        )
    parts: tuple[list[Problem], list[Problem]] = ([], [])
    for i, problem in enumerate(problem_set.problems):
        parts[i in chosen].append(problem)
    train, validation = (tuple(part) for part in parts)
    return ProblemSet(train, problem_set.name), ProblemSet(validation, f"{problem_set.name} (held out)")


def choose(
    problem_set: ProblemSet, shuffle: int | None = None, skip: int | None = None, count: int | None = None
) -> ProblemSet:
    """A part of a problem set.

    Args:
      problem_set: what to choose from.
      shuffle: seed of a permutation, the one of `datasets.Dataset.shuffle`; None leaves the order.
      skip: then so many are left out at the beginning.
      count: then so many are taken; None for all.

    Raises:
      ValueError: if there are not so many.
    """
    problems, size = problem_set.problems, len(problem_set)
    if shuffle is not None:
        problems = tuple(problems[i] for i in np.random.default_rng(shuffle).permutation(size))
    skip = skip or 0
    left = size - skip
    count = left if count is None else count
    if not 0 < count <= left:
        raise ValueError(
            f"skip={skip}, count={count}: {problem_set.name} has {size} problems; choose together at most "
            "so many, and a count of at least 1"
        )
    return dataclasses.replace(problem_set, problems=problems[skip : skip + count])


def join(problem_sets: Sequence[tuple[str, ProblemSet]]) -> ProblemSet:
    """Several problem sets as one, in their order.

    Args:
      problem_sets: what goes before ids that occur in several, and the set.

    Raises:
      ValueError: if two have a statement in common, or ids that are not distinct even so.
    """
    if len(problem_sets) == 1:
        return problem_sets[0][1]
    for (_, ones), (_, others) in itertools.combinations(problem_sets, 2):
        _refuse_shared(ones.name, ones, others.name, others, keys=_text_key)
    count = collections.Counter(problem.id for _, each in problem_sets for problem in each.problems)
    problems = tuple(
        dataclasses.replace(problem, id=f"{name}-{problem.id}") if count[problem.id] > 1 else problem
        for name, each in problem_sets
        for problem in each.problems
    )
    return ProblemSet(problems, " + ".join(each.name for _, each in problem_sets))


def check_disjoint(**splits: ProblemSet) -> None:
    """Checks that no problem is in two splits, by its id or by its text as `statements.comparable` sees it.

    Raises:
      ValueError: naming the problem and the two splits.
    """
    for (one, ones), (other, others) in itertools.combinations(splits.items(), 2):
        _refuse_shared(f"{one} ({ones.name})", ones, f"{other} ({others.name})", others, keys=_all_keys)


def _refuse_shared(
    one: str, ones: ProblemSet, other: str, others: ProblemSet, keys: Callable[[Problem], _Keys]
) -> None:
    known = {key: problem for problem in ones.problems for key in keys(problem)}
    for problem in others.problems:
        for key in keys(problem):
            if key in known:
                raise ValueError(
                    f"problem {problem.id!r} of {other} has the same {key[0]} as {known[key].id!r} of {one}; "
                    "remove it from one of them, or choose parts without it"
                )


def _text_key(problem: Problem) -> _Keys:
    return (("text", comparable(problem.text)),)


def _all_keys(problem: Problem) -> _Keys:
    return ("id", problem.id), *_text_key(problem)
