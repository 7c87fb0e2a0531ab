"""The trackers themselves: processes are killed at every boundary, and what is stored is read back."""

import collections
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.support import tracked
from tests.trackers import readers

READERS = {
    "tensorboard": readers.tensorboard,
    "wandb": readers.wandb,
    "trackio": readers.trackio,
    "mlflow": readers.mlflow,
}
KILLS = (("before", 2), ("after", 2), ("noted", 1), ())
"""The moments at which one process after the other kills itself; the last one ends the run."""


@pytest.fixture(params=READERS)
def tracker(request, tmp_path, monkeypatch):
    """The name of a tracker whose package is there; everything that it stores is in a folder of the test."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # where MLflow keeps artifacts
    # trackio reads its variables when it is imported.
    pytest.importorskip(request.param, reason=f"needs the package {request.param}")
    return request.param


@pytest.mark.slow(minutes=4)
def test_killed_and_resumed(tracker, tmp_path):
    path = tmp_path / "run"
    for kill in KILLS:
        command = [sys.executable, "-m", "tests.support.tracked", str(path), tracker, "6", *map(str, kill)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment
        )
        assert done.returncode == (-signal.SIGKILL if kill else 0), done.stdout + done.stderr
    assert "failed" not in done.stdout
    assert json.loads((path / "trackers" / f"{tracker}.json").read_text())["failures"] == 0
    run_id = (path / "trackers" / "id").read_text()
    stored = READERS[tracker](path, run_id)

    wanted = {(name, i): v for i, flat in tracked.logged(path).items() for name, v in flat.items()}
    counts = collections.Counter(key for key, _ in stored.scalars)
    assert {key: count for key, count in counts.items() if count > 1} == {}
    scalars = dict(stored.scalars)
    assert {key: scalars.get(key) for key in wanted} == pytest.approx(wanted, rel=1e-6)
    assert {key for key in scalars if not key[0].startswith(("test/", "_"))} == wanted.keys()
    cells = ("initial/root", "trained/root", "trained/deployed")
    test = {f"test/{cell}/{name}" for cell in cells for name in ("accuracy", "low", "high")}
    assert {name for name, _ in scalars if name.startswith("test/")} == test
    for i in range(1, 7):
        lengths, _ = tracked.lengths_and_rewards(i)
        counts, edges = stored.histograms["distributions/reply_tokens", i]
        assert sum(counts) == 4 and (min(edges), max(edges)) == pytest.approx((lengths.min(), lengths.max()))
        assert f"p{i}: mutation of p0" in stored.texts["prompts/entered", i]
        assert f"p{i}: mutation of p0" in stored.texts["prompts/best", i]
    assert "p0: root" in stored.texts["prompts/entered", 1]
    assert "Reason: largest mu - 2 sigma" in stored.deployed
    assert "hunter22" not in stored.config and "***@host" in stored.config
    assert np.isfinite(list(scalars.values())).all()
