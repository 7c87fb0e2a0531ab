"""MLflow: the store that MLFLOW_TRACKING_URI names, by default the one of MLflow in the working directory."""

# pyright: reportMissingImports=false
# The package is optional.

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus

from espl_jax.trackers.base import Had, Point, TrackedRun

_ID, _ITERATION, _RESULTS = "espl_jax.id", "espl_jax.iteration", "espl_jax.results"
_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 1000, 100, 6000

T = TypeVar("T")


class MLflow:
    """Logs scalars as metrics, and histograms and texts as artifacts.

    Writing a point takes several calls. A tag that is set by the last one says that the point is complete.
    When the run is opened again, all metrics are read back; those that are there are not logged again, since
    MLflow would keep both. Artifacts are overwritten.
    """

    fix = "check MLFLOW_TRACKING_URI, the network, and that the store is the one that the run began with"

    def __init__(self, run: TrackedRun):
        self._tracked = run
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports every migration of its tables
        self._client = MlflowClient()
        self._run_id = ""
        self._logged: set[tuple[str, int]] = set()

    def open(self) -> Had:
        client = self._client
        run = client.get_run(self._find() or self._create())
        self._run_id = run.info.run_id
        client.update_run(self._run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        # MLflow refuses to change a parameter; those of a resumed run keep their first value.
        new = {name: value for name, value in self._tracked.config.items() if name not in run.data.params}
        params = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in new.items()]
        for part in _parts(params, _MOST_PARAMS):
            client.log_batch(self._run_id, params=part)
        for name in run.data.metrics:
            self._logged |= {(name, each.step) for each in client.get_metric_history(self._run_id, name)}
        tags = run.data.tags
        return Had(int(tags.get(_ITERATION, 0)), int(tags.get(_RESULTS, 0)))

    def log(self, point: Point) -> None:
        client, run_id = self._client, self._run_id
        for name, text in point.texts.items():
            client.log_text(run_id, text, f"{name}/{point.step:08d}.txt")
        for name, values in point.histograms.items():
            counts, edges = np.histogram(values, bins=min(64, len(np.unique(values))))
            histogram = {"counts": counts.tolist(), "edges": edges.tolist()}
            client.log_dict(run_id, histogram, f"{name}/{point.step:08d}.json")
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, point.step)
            for name, value in point.scalars.items()
            if (name, point.step) not in self._logged
        ]
        for part in _parts(metrics, _MOST_METRICS):
            client.log_batch(run_id, metrics=part)
            self._logged |= {(metric.key, metric.step) for metric in part}
        client.set_tag(run_id, _ITERATION if point.kind == "iteration" else _RESULTS, str(point.step))

    def close(self, finished: bool) -> None:
        if self._run_id:
            self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")

    def _find(self) -> str:
        experiment = self._client.get_experiment_by_name(self._tracked.project)
        if not experiment:
            return ""
        wanted = f"tags.`{_ID}` = '{self._tracked.id}'"
        found = self._client.search_runs([experiment.experiment_id], wanted)
        return found[0].info.run_id if found else ""

    def _create(self) -> str:
        experiment = self._client.get_experiment_by_name(self._tracked.project)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(self._tracked.project)
        )
        # The tag is part of the same call, so that a kill leaves no run without it.
        run = self._client.create_run(
            experiment_id, tags={_ID: self._tracked.id}, run_name=self._tracked.name
        )
        return run.info.run_id


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
