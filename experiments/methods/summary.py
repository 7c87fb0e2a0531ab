"""Test results of several runs: means with intervals over seeds and problems, and paired differences."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espl_jax.console.tables import percent, table
from espl_jax.rollouts import intervals
from experiments.methods.runs import CELLS, Record

TITLES = {"test": "Test accuracy", "hard": "Accuracy on harder problems"}
"""Name of the problems, of `runs.TESTS`, -> title of their table."""


def with_test(record: Record) -> list[dict[str, Any]]:
    """Returns the rows of a run's iterations; the last one has the test accuracies of the deployed prompt."""
    rows = [row | dict.fromkeys(record.tests) for row in record.iterations]
    for row in rows[-1:]:
        row |= {test: float(cells[CELLS[-1]].mean()) for test, cells in record.tests.items()}
    return rows


def results(records: Sequence[Record]) -> str:
    """Returns tables of test accuracy and of differences between methods, and the deployed prompts."""
    by_method: dict[str, dict[int, Record]] = {}
    for each in records:
        by_method.setdefault(each.method, {})[each.seed] = each
    parts = []
    for test, title in TITLES.items():
        if not all(test in each.tests for each in records):
            continue
        parts += [f"{title}, with 95% intervals:", table(_accuracy(by_method, test))]
        if differences := _differences(by_method, test):
            parts += ["Paired differences, trained weights and deployed prompt:", table(differences)]
    parts += ["Deployed prompts:"]
    for each in itertools.chain.from_iterable(of_seeds.values() for of_seeds in by_method.values()):
        quoted = "\n".join(f"> {line}".rstrip() for line in each.deployed.render().splitlines())
        parts.append(f"{each.method}, seed {each.seed}:\n\n{quoted}")
    return "\n\n".join(parts) + "\n"


def _accuracy(by_method: Mapping[str, Mapping[int, Record]], test: str) -> list[list[str]]:
    """A table of the cells of each method."""
    cells = (f"{weights} weights, {prompt} prompt" for weights, prompt in CELLS)
    rows = [["method", "seeds", *cells, "KL, nats per token"]]
    for method, of_seeds in by_method.items():
        stacked = [np.stack([each.tests[test][cell] for each in of_seeds.values()]) for cell in CELLS]
        shown = [percent(float(rates.mean()), *intervals.of_share(rates, rates.size)) for rates in stacked]
        kl = np.mean([each.kl for each in of_seeds.values()])
        rows.append([method, str(len(of_seeds)), *shown, f"{kl:.4f}"])
    return rows


def _differences(by_method: Mapping[str, Mapping[int, Record]], test: str) -> list[list[str]]:
    """A table of `espl`, or of the last method, less each other one, on the seeds that both have."""
    last = "espl" if "espl" in by_method else [*by_method][-1]
    rows = []
    for other in by_method:
        seeds = sorted(by_method[last].keys() & by_method[other].keys())
        if seeds and other != last:
            ends = (
                np.stack([by_method[method][seed].tests[test][CELLS[-1]] for seed in seeds])
                for method in (last, other)
            )
            rows.append([f"{last} - {other}", str(len(seeds)), intervals.difference(np.subtract(*ends))])
    return [["methods", "seeds", "difference"], *rows] if rows else []
