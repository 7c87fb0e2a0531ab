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
      rates: float [problems], success rates of the last cell, averaged over seeds; None without a test.
      problems: ids of the problems, in the order of `rates`.
    """

    name: str
    runs: tuple[int, ...]
    rates: np.ndarray | None
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Difference:
    """The paired difference of two methods on the test problems that both have.

    Attributes:
      methods: names, `a - b`.
      problems: number of problems.
      text: the mean difference and its 95% interval in percentage points.
    """

    methods: str
    problems: int
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
        values = np.array([[cell[problem] for problem in shared] for cell in cells])
        means = values.mean(axis=0) if shared else None
        found.append(Method(names[members[0]], tuple(members), means, tuple(shared)))
    return found


def accuracy(method: Method) -> str:
    """Returns the test accuracy of a method with its 95% interval over problems; a dash without a test."""
    if method.rates is None:
        return "–"
    low, high = intervals.of_share(method.rates, len(method.rates) * len(method.runs))
    return percent(float(method.rates.mean()), low, high)


def differences(methods: Sequence[Method]) -> list[Difference]:
    """Returns the difference of each method from the first one, paired by problem.

    Intervals are Student's over problems (Miller 2024, arXiv 2411.00640, section 4).
    """
    first, *others = methods
    found = []
    for other in others:
        theirs = dict(zip(other.problems, () if other.rates is None else other.rates, strict=True))
        ours = dict(zip(first.problems, () if first.rates is None else first.rates, strict=True))
        shared = [problem for problem in theirs if problem in ours]
        if not shared:
            continue
        paired = np.array([theirs[problem] - ours[problem] for problem in shared])
        found.append(Difference(f"{other.name} − {first.name}", len(shared), _points(paired)))
    return found


def _points(paired: np.ndarray) -> str:
    interval = intervals.of_mean(paired)
    mean = f"{100 * float(paired.mean()):+.1f} points"
    if interval is None or not paired.std():
        return f"{mean} (no interval: all problems have the same difference)"
    return f"{mean} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
