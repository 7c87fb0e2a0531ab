"""Test results of runs, and paired differences between them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from espl_jax.console.tables import percent
from espl_jax.report.configuration import flat
from espl_jax.report.read import RunLogs
from espl_jax.rollouts import intervals

WEIGHTS = ("initial", "trained")
PROMPTS = ("root", "deployed")

T = TypeVar("T")

Rates = Mapping[tuple[str, str], Mapping[str, float]]
"""(weights, prompt) -> problem -> success rate on the test."""

FREE = (
    "seed",
    "compilation_cache",
    "compile_ahead",
    "checkpoint_",
    "profile_iteration",
    "resume.",
    "logs.",
    "report.",
    "track",
)
"""Beginnings of the names of fields in which seeds of one method may differ."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Runs whose configurations differ only in their seeds.

    Attributes:
      name: name of its first run.
      runs: indices of its runs.
      seeds: of its runs.
      rates: float [runs, problems], success rates of the last cell; None without a test.
      problems: ids of the problems, in the order of `rates`.
    """

    name: str
    runs: tuple[int, ...]
    seeds: tuple[int, ...]
    rates: np.ndarray | None
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Difference:
    """The paired difference of two methods on the test problems and seeds that both have.

    Attributes:
      methods: names, `a - b`.
      problems: number of problems that both were tested on.
      seeds: number of seeds that both have.
      text: the mean difference and its 95% interval in percentage points.
    """

    methods: str
    problems: int
    seeds: int
    text: str


def test_rates(run: RunLogs) -> Rates:
    """Returns the success rates of the test at the end of a run; empty before."""
    if not run.results.get("test"):
        return {}
    ids: dict[str, str] = {run.deployed: "deployed"} | {run.root: "root"}
    success: dict[tuple[str, str], dict[str, list[bool]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for each in run.evaluations():
        if each["split"] == "test" and each["iteration"] == run.results["iteration"]:
            prompt = str(each["prompt"])
            cell = str(each["weights"]), ids.get(prompt, prompt)
            success[cell][each["problem"]].append(bool(each["success"]))
    return {
        cell: {problem: float(np.mean(values)) for problem, values in by_problem.items()}
        for cell, by_problem in success.items()
    }


def outcome(cells: Mapping[tuple[str, str], T]) -> T | None:
    """Returns the cell of the run's outcome: trained weights and deployed prompt, or the nearest it has."""
    for weights in reversed(WEIGHTS):
        for prompt in reversed(PROMPTS):
            if (weights, prompt) in cells:
                return cells[weights, prompt]
    return None


def methods_of(runs: Sequence[RunLogs], names: Sequence[str], rates: Sequence[Rates]) -> list[Method]:
    """Groups runs whose configurations differ only in their seeds."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = collections.defaultdict(list)
    for index, run in enumerate(runs):
        fields = [pair for pair in sorted(flat(run.config).items()) if not pair[0].startswith(FREE)]
        groups[tuple(fields)].append(index)
    found = []
    for members in groups.values():
        cells = [outcome(rates[index]) or {} for index in members]
        shared = [problem for problem in cells[0] if all(problem in cell for cell in cells)]
        values = np.array([[cell[problem] for problem in shared] for cell in cells]) if shared else None
        seeds = tuple(int(runs[index].config.get("seed", 0)) for index in members)
        found.append(Method(names[members[0]], tuple(members), seeds, values, tuple(shared)))
    return found


def accuracy(method: Method) -> str:
    """Returns the test accuracy of a method with its 95% interval; a dash without a test."""
    if method.rates is None:
        return "–"
    low, high = intervals.of_share(method.rates, method.rates.size)
    return percent(float(method.rates.mean()), low, high)


def differences(methods: Sequence[Method]) -> list[Difference]:
    """Returns the difference of each method from the first one, paired by problem and by seed.

    Methods without a common seed are paired by problem alone, with the mean over the seeds of each.
    """
    first, *others = methods
    found = []
    for other in others:
        problems = [problem for problem in other.problems if problem in first.problems]
        if not problems:
            continue
        seeds = [seed for seed in dict.fromkeys(other.seeds) if seed in first.seeds]
        theirs, ours = (_rates(method, seeds, problems) for method in (other, first))
        found.append(
            Difference(
                f"{other.name} − {first.name}", len(problems), len(seeds), intervals.difference(theirs - ours)
            )
        )
    return found


def _rates(method: Method, seeds: Sequence[int], problems: Sequence[str]) -> np.ndarray:
    """Returns float [seeds, problems], the success rates of a method; without seeds the mean over its own."""
    assert method.rates is not None
    columns = method.rates[:, [method.problems.index(problem) for problem in problems]]
    return columns[[method.seeds.index(seed) for seed in seeds]] if seeds else columns.mean(0, keepdims=True)
