"""Problem sets, and checks that they are disjoint."""

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
      name: the source, for messages and reports.

    Raises:
      ValueError: for an empty set, or a repeated id.
    """

    problems: tuple[Problem, ...]
    name: str

    def __post_init__(self):
        if not self.problems:
            raise ValueError(f"{self.name}: no problems; give at least one")
        seen = set()
        for problem in self.problems:
            if problem.id in seen:
                raise ValueError(f"{self.name}: repeated id {problem.id!r}; make ids unique")
            seen.add(problem.id)

    def __len__(self) -> int:
        return len(self.problems)


def hold_out(problem_set: ProblemSet, count: int, seed: int) -> tuple[ProblemSet, ProblemSet]:
    """Splits a validation set off a problem set.

    Problems whose statements are equal under `statements.comparable` are never held out.

    Args:
      problem_set: the problems to split.
      count: number of problems to hold out, at least one and fewer than all.
      seed: determines which problems are held out.

    Returns:
      (train, validation), both in the order of the set.

    Raises:
      ValueError: if either side would be empty, or too few problems have a unique statement.
    """
    if not 0 < count < len(problem_set):
        raise ValueError(
            f"count={count}: cannot hold out that many of the {len(problem_set)} problems of "
            f"{problem_set.name}; choose 1 to {len(problem_set) - 1}"
        )
    texts = [comparable(problem.text) for problem in problem_set.problems]
    copies = collections.Counter(texts)
    order = np.random.default_rng(seed).permutation(len(problem_set)).tolist()
    chosen = set([i for i in order if copies[texts[i]] == 1][:count])
    if len(chosen) < count:
        raise ValueError(
            f"count={count}: cannot hold out that many problems of {problem_set.name}, of which only "
            f"{len(chosen)} have a unique statement; choose at most {len(chosen)}"
        )
    parts: tuple[list[Problem], list[Problem]] = ([], [])
    for i, problem in enumerate(problem_set.problems):
        parts[i in chosen].append(problem)
    train, validation = (tuple(part) for part in parts)
    return ProblemSet(train, problem_set.name), ProblemSet(validation, f"{problem_set.name} (held out)")


def choose(
    problem_set: ProblemSet, shuffle: int | None = None, skip: int | None = None, count: int | None = None
) -> ProblemSet:
    """Returns a subset of a problem set.

    Args:
      problem_set: the problems to choose from.
      shuffle: seed of a permutation, the same as in `datasets.Dataset.shuffle`; None keeps the order.
      skip: number of problems to drop from the beginning, after shuffling.
      count: number of problems to keep after that; None for all.

    Raises:
      ValueError: if there are fewer problems.
    """
    problems, size = problem_set.problems, len(problem_set)
    if shuffle is not None:
        problems = tuple(problems[i] for i in np.random.default_rng(shuffle).permutation(size))
    skip = skip or 0
    left = size - skip
    count = left if count is None else count
    if not 0 < count <= left:
        raise ValueError(
            f"skip={skip}, count={count}: {problem_set.name} has {size} problems; lower skip or count, and "
            "give a count of at least 1"
        )
    return dataclasses.replace(problem_set, problems=problems[skip : skip + count])


def join(problem_sets: Sequence[tuple[str, ProblemSet]]) -> ProblemSet:
    """Concatenates problem sets.

    Args:
      problem_sets: pairs of a prefix, for ids that occur in several sets, and a set.

    Raises:
      ValueError: if two sets share a statement, or if ids are not unique even with prefixes.
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
    """Checks that no problem is in two splits, by id or by text as normalized by `statements.comparable`.

    Raises:
      ValueError: with the problem and the two splits.
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
                    "remove it from one of them, or choose subsets without it"
                )


def _text_key(problem: Problem) -> _Keys:
    return (("text", comparable(problem.text)),)


def _all_keys(problem: Problem) -> _Keys:
    return ("id", problem.id), *_text_key(problem)
