"""trackio: a local database, or a Space or server that its environment variables name."""

# pyright: reportMissingImports=false
# The package is optional.

from __future__ import annotations

import os
import time
from typing import Any

import trackio
from trackio.sqlite_storage import SQLiteStorage
from trackio.utils import get_storage_mode

from espl_jax.trackers.base import Had, Point, TrackedRun

_RESULTS_KEY = "prompts/deployed"
_WRITE_SECONDS = 30.0


class Trackio:
    """Logs each point as one row, which is atomic.

    trackio writes from a background thread and does not raise. A local row is therefore waited for.
    """

    fix = "check TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL"

    def __init__(self, run: TrackedRun):
        self._tracked = run
        # Runs are resumed by name, so that it must be unique.
        self.name = f"{run.name}-{run.id[:6]}"
        remote = any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        self._readable = not remote and get_storage_mode() == "sqlite"
        self._run: Any = None

    def open(self) -> Had | None:
        self._run = trackio.init(
            project=self._tracked.project,
            name=self.name,
            config=dict(self._tracked.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        if not self._readable:
            return None
        logged = self._rows()
        steps = [row["step"] for row in logged if _RESULTS_KEY not in row]
        results = [row["step"] for row in logged if _RESULTS_KEY in row]
        return Had(max(steps, default=0), max(results, default=0))

    def log(self, point: Point) -> None:
        row: dict[str, Any] = dict(point.scalars)
        row |= {name: trackio.Histogram(values) for name, values in point.histograms.items()}
        for name, text in point.texts.items():
            row[name] = trackio.Markdown("\n".join("    " + line for line in text.splitlines()))
        before = self._count() if self._readable else 0
        self._run.log(row, step=point.step)
        deadline = time.monotonic() + _WRITE_SECONDS
        while self._readable and self._count() <= before:
            if time.monotonic() > deadline:
                raise RuntimeError(f"trackio has not written step {point.step} in {_WRITE_SECONDS:.0f} s")
            time.sleep(0.05)

    def close(self, finished: bool) -> None:
        if self._run:
            self._run.finish()
            self._run = None

    def _rows(self) -> list[dict[str, Any]]:
        return SQLiteStorage.get_logs(self._tracked.project, self.name, run_id=self._run.id)

    def _count(self) -> int:
        return SQLiteStorage.get_log_count(self._tracked.project, self.name, run_id=self._run.id)
