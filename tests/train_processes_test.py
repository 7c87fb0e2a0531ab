"""The whole loop in two processes of four devices: what one process of eight makes of it, killed or not."""

import io
import json
import os
import signal

import jax
import numpy as np
import pytest
from rich.console import Console

from espl_jax import train as loop
from espl_jax.parallel import processes
from espl_jax.reflectors.local import local_reflector
from espl_jax.run import reflection, tasks, weights
from tests.support import fakes
from tests.support.two_processes import run_pair
from tests.train_test import LOGS, arrays, lines

SETTINGS = {
    "mesh__fsdp": 4,
    "mesh__tensor": 2,
    "evaluation__every": 0,
    "data__test": "",
    "checkpoint_every": 1,
}


class Letters(fakes.Letters):
    """Its grades would differ between processes."""

    def grade(self, problems, replies):
        return super().grade(problems, [reply + "!" * jax.process_index() for reply in replies])


def reflector(model, **settings):
    """The model's own reflection, on all devices; as it says noise, scripted advice takes its place."""
    reflect = local_reflector(model, **settings)

    def advice(conversations):
        processes.agree("a reply", reflect(conversations[:1]))
        return fakes.scripted_replies(conversations)

    return advice


def run(path, killed=None):
    """A run of two iterations; the process of that number is killed in the second."""
    iterate = loop.iterate

    def die(job, run, *args):
        if run.iteration == 1 and jax.process_index() == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return iterate(job, run, *args)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(weights, "load_pretrained", fakes.load_pretrained)
        monkeypatch.setattr(tasks, "Arithmetic", Letters)
        monkeypatch.setattr(reflection, "local_reflector", reflector)
        monkeypatch.setattr(loop, "iterate", die)
        shown = io.StringIO()
        loop.train(fakes.config(**SETTINGS), path, Console(file=shown, width=200))
    print(shown.getvalue())


def assert_like(ours, reference):
    """Equal, but for floats, whose last bits the order of sums decides."""
    if isinstance(reference, dict):
        assert list(ours) == list(reference)
        for name in reference.keys() - {"time"}:
            assert_like(ours[name], reference[name])
    elif isinstance(reference, list):
        assert len(ours) == len(reference)
        for x, y in zip(ours, reference, strict=True):
            assert_like(x, y)
    elif isinstance(reference, float):
        assert ours == pytest.approx(reference, rel=1e-4, abs=1e-6)
    else:
        assert ours == reference


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    """Killed and resumed, they end in the same bits as two that were left alone. One process of eight devices
    ends in other last bits, since sums between processes have another order."""
    program = "from tests.train_processes_test import run; run(sys.argv[1], *map(int, sys.argv[2:]))"
    with pytest.raises(AssertionError, match=r"process 1 ended with -9"):
        run_pair(program, tmp_path / "pair", 1, timeout=900)
    assert [record["iteration"] for record in lines(tmp_path / "pair", "metrics")] == [1]
    shown, by_the_other = run_pair(program, tmp_path / "pair", timeout=900)
    assert "resumed after iteration 1" in shown and "iteration 2/2" in shown
    assert "iteration" not in by_the_other

    assert "2 of 2" in (tmp_path / "pair" / "report.html").read_text()

    run_pair(program, tmp_path / "whole", timeout=900)
    resumed, whole = arrays(tmp_path / "pair"), arrays(tmp_path / "whole")
    assert resumed.keys() == whole.keys()
    for name, x in whole.items():
        np.testing.assert_array_equal(resumed[name], x, err_msg=name)

    run(tmp_path / "one")
    for log in ("metrics", *LOGS):
        assert_like(lines(tmp_path / "pair", log), lines(tmp_path / "one", log))
    for name in ("population.json", "results.json"):
        assert_like(*(json.loads((tmp_path / run / name).read_text()) for run in ("pair", "one")))
    assert len(lines(tmp_path / "one", "lineage")) > 1  # there were children
    reference = arrays(tmp_path / "one")
    assert resumed.keys() == reference.keys()
    for name, x in reference.items():
        np.testing.assert_allclose(resumed[name], x, rtol=1e-4, atol=1e-6 * np.abs(x).max(initial=1e-9))
