"""Weights & Biases, online or offline (`WANDB_MODE=offline`)."""

# pyright: reportMissingImports=false
# The package is optional.

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

import numpy as np
import wandb

from espl_jax.storage import folders
from espl_jax.trackers.base import Had, Point, TrackedRun
from espl_jax.trackers.wandb_files import rows

_MOST_BINS = 64


class WeightsAndBiases:
    """Logs each iteration as one row of the run's history, and results to its summary.

    A row is atomic, and the summary is overwritten. A resumed online run begins at the step after the last
    row that the server has; that of an offline run is read from its files.
    """

    fix = "check WANDB_API_KEY and the network, or set WANDB_MODE=offline and sync later"

    def __init__(self, run: TrackedRun):
        self._tracked = run
        self._run: Any = None
        remote = folders.is_remote(run.workdir)
        self._folder = Path(os.environ.get("WANDB_DIR") or ("." if remote else run.workdir)).absolute()

    def open(self) -> Had:
        wandb.setup(wandb.Settings(silent=True))  # `init` prints advice without looking at its own settings
        self._run = wandb.init(
            project=self._tracked.project,
            id=self._tracked.id,
            name=self._tracked.name,
            config=dict(self._tracked.config),
            dir=self._folder,
            resume="allow",
            reinit="create_new",  # leaves alone a run of other code in this process
            settings=wandb.Settings(
                console="off", silent=True, x_disable_stats=True, init_timeout=60, finish_timeout=60
            ),
        )
        if self._run.offline:
            return Had(max((step for step, _ in rows(self._folder, self._tracked.id)), default=0))
        return Had(max(0, self._run.starting_step - 1))

    def log(self, point: Point) -> None:
        texts = {name: f"<pre>{html.escape(text)}</pre>" for name, text in point.texts.items()}
        if point.kind == "results":
            self._run.summary.update({**point.scalars, **point.texts})
            return
        row: dict[str, Any] = dict(point.scalars)
        for name, values in point.histograms.items():
            bins = min(_MOST_BINS, len(np.unique(values)))
            row[name] = wandb.Histogram(np_histogram=np.histogram(values, bins=bins))
        row |= {name: wandb.Html(text, inject=False) for name, text in texts.items()}
        self._run.log(row, step=point.step, commit=True)

    def close(self, finished: bool) -> None:
        if self._run:
            self._run.finish(exit_code=0 if finished else 1)
            self._run = None
