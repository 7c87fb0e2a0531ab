"""Learning curves of several runs as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.methods.runs import Record

PANELS = {"reward": "mean reward of the rollouts", "validation": "validation accuracy, best prompt"}


def curves(records: Sequence[Record], column: str) -> dict[str, np.ndarray]:
    """Returns method -> float [S, T], a column of the iterations of S seeds; methods without it are left out.

    Seeds are cut to the iterations that all of them have.
    """
    found: dict[str, list[list[float]]] = {}
    for each in records:
        values = [row[column] for row in each.iterations if row[column] is not None]
        if values:
            found.setdefault(each.method, []).append(values)
    cut = {method: min(map(len, seeds)) for method, seeds in found.items()}
    return {method: np.array([seed[: cut[method]] for seed in seeds]) for method, seeds in found.items()}


def draw(records: Sequence[Record], path: Path) -> None:
    """Draws a panel for each column that a record has: thin lines for seeds, a thick one for their mean."""
    panels = {title: found for column, title in PANELS.items() if (found := curves(records, column))}
    if not panels:
        return
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="tight")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, found) in zip(axes[0], panels.items(), strict=True):
        for number, (method, seeds) in enumerate(found.items()):
            iterations = np.arange(1, seeds.shape[1] + 1)
            color = f"C{number % 10}"
            axis.plot(iterations, seeds.T, color=color, alpha=0.3, linewidth=0.8)
            axis.plot(iterations, seeds.mean(axis=0), color=color, linewidth=2, label=method)
        axis.set(xlabel="iteration", title=title, ylim=(min(0, axis.get_ylim()[0]), None))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=120)
