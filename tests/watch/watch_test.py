"""The view of a run, in every state in which a run can be."""

import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from rich.console import Console

from espl_jax.storage import status
from espl_jax.storage.local import LocalLog
from espl_jax.storage.workdir import WorkDir
from espl_jax.watch.__main__ import watch
from espl_jax.watch.render import line, render
from espl_jax.watch.run_view import Watcher
from espl_jax.watch.tail import Tail
from espl_jax.watch.text import number, safe, sparkline
from tests.conftest import ROOT
from tests.support import tracked

NOW = 1_000_000.0
SIZES = {"mode": "espl", "num_prompts": 2, "batch_size": 3, "group_size": 4}


def config(iterations=6):
    return tracked.config(iterations=iterations) | SIZES


@pytest.fixture
def run(tmp_path):
    """A finished run of six iterations."""
    path = tmp_path / "run"
    tracked.simulate(path, config(), say=lambda text: None)
    members = [dataclasses.asdict(tracked.member(i)) for i in range(7)]
    population = {"max_size": 10, "created": 7, "members": members}
    (path / "population.json").write_text(json.dumps(population))
    return path


def write_status(path, **changes):
    now = status.Status(
        phases=("rollouts",), iteration=6, num_iterations=6, since=NOW - 5, begun=NOW - 9, alive=NOW - 1
    )
    now = dataclasses.replace(now, pid=os.getpid(), host=socket.gethostname())
    (path / "status.json").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(now, **changes))))


def look(path):
    return Watcher(path, clock=lambda: NOW).look()


def shown(view, width=80):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(render(view, width))
    return out.getvalue()


class TestStates:
    def test_no_run(self, tmp_path):
        with pytest.raises(ValueError, match=r"^--workdir=.*: there is no run; give the work directory"):
            look(tmp_path / "none")
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(ValueError, match="there is no run"):
            look(tmp_path)

    def test_before_the_first_checkpoint(self, tmp_path):
        with WorkDir(tmp_path, config()):
            write_status(tmp_path, phases=("loading",), iteration=0)
        view = look(tmp_path)
        assert (view.state, view.phase, view.checkpoint, view.iteration) == (
            "running",
            ("loading", 5.0),
            None,
            0,
        )
        assert view.seconds_left is None and not view.curves
        assert "running  0 of 6 iterations, no checkpoint yet" in shown(
            view
        ) and "loading for 5.0 s" in shown(view)
        assert line(view) == "0 of 6 iterations  running  loading"

    def test_running(self, run):
        settings = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(settings | {"num_iterations": 10}))
        (run / "results.json").unlink()
        write_status(run, num_iterations=10)
        view = look(run)
        records = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        totals = sorted(record["time"]["total"] for record in records)
        median = (totals[2] + totals[3]) / 2
        assert view.state == "running" and view.phase == ("rollouts", 5.0)
        assert view.seconds_per_iteration == pytest.approx(median)
        assert view.seconds_left == pytest.approx(4 * median - min(9.0, median))
        # 10.5 tokens per rollout, 24 rollouts.
        assert view.tokens_per_second == pytest.approx(10.5 * 24 / records[-1]["time"]["rollouts"])
        assert view.curves["reward"] == [i / 8 for i in range(1, 7)]
        assert [member.id for member in view.best] == ["p6", "p5", "p4"]
        assert [heading for heading, _ in view.edits] == [
            f"p{i}  mutation of p0, iteration {i}" for i in (6, 5, 4)
        ]
        lines = shown(view).splitlines()
        assert lines[2] == f"│ {'━' * 46}{'┄' * 30} │" and lines[3].startswith("│ rollouts for 5.0 s ")

    def test_results_of_an_earlier_end_are_not_shown(self, run):
        assert look(run).results
        settings = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(settings | {"num_iterations": 10}))
        write_status(run, num_iterations=10)
        assert not look(run).results

    def test_finished(self, run):
        write_status(run, state="finished", alive=NOW - 1e6)
        view = look(run)
        assert view.state == "finished" and view.phase is None and view.seconds_left is None
        assert "trained weights, deployed prompt: 50.0% [25.0, 75.0]" in shown(view)
        assert "deployed: p6 (largest mu - 2 sigma)" in shown(view)

    def test_of_a_version_without_status(self, run):
        (run / "status.json").unlink(missing_ok=True)
        assert look(run).state == "finished"
        (run / "results.json").unlink()
        view = look(run)
        assert view.state == "unknown" and "There is no status.json" in view.warnings[0]

    @pytest.mark.parametrize("found", ["not json", "[]", '{"state": "running"}', '{"new": 1}'])
    def test_of_a_status_that_cannot_be_read(self, found, run):
        (run / "status.json").write_text(found)
        assert look(run).state == "finished"

    @pytest.mark.parametrize(
        ("changes", "state"),
        [
            ({"alive": NOW - 64}, "running"),  # this process is there
            ({"alive": NOW - 66}, "lost"),
            ({"pid": 2**22 + 1, "alive": NOW - 14}, "running"),  # may be in another container
            ({"pid": 2**22 + 1, "alive": NOW - 16}, "lost"),
            ({"pid": 2**22 + 1, "alive": NOW - 16, "host": "elsewhere"}, "running"),
            ({"alive": NOW - 89, "every": 30.0, "host": "elsewhere"}, "running"),
            ({"alive": NOW + 100, "host": "elsewhere"}, "running"),  # a clock that is ahead
            ({"state": "stopped", "alive": NOW - 1e6}, "stopped"),
        ],
    )
    def test_running_stopped_or_lost(self, changes, state, run):
        (run / "results.json").unlink()
        write_status(run, **changes)
        view = look(run)
        assert view.state == state
        if state == "lost":
            assert "process gone" in shown(view) and "The same command resumes it." in " ".join(view.warnings)

    def test_a_run_that_was_killed(self, tmp_path):
        """The status of a real process."""
        code = (
            "import os, signal, sys, time\n"
            "from espl_jax.storage import status\n"
            "with status.written(sys.argv[1], 6, True) as show:\n"
            "    show(('update',), 3)\n"
            "    time.sleep(1)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, timeout=120)
        assert done.returncode == -signal.SIGKILL
        found = status.read(tmp_path)
        assert found is not None and (found.phases, found.iteration, found.state) == (
            ("update",),
            3,
            "running",
        )
        assert not found.lost(found.alive + 1) and found.lost(found.alive + 16)


class TestWarnings:
    def test_of_trackers(self, run):
        (run / "trackers").mkdir()
        (run / "trackers" / "wandb.json").write_text('{"failures": 3, "error": "no network"}')
        (run / "trackers" / "mlflow.json").write_text('{"failures": 1, "error": ""}')
        warnings = look(run).warnings
        assert "Tracker wandb failed 3 times; now: no network." in warnings
        assert "Tracker mlflow failed 1 times, and has recovered." in warnings

    def test_of_metrics(self, run):
        record = tracked.metrics(7) | {
            "truncated": 0.9,
            "not_finite_in_row": 2,
            "skipped_updates": 4,
            "children": [],
            "groups": 6,
            "mixed_groups": 0,
        }
        with (run / "metrics.jsonl").open("a") as file:
            for i in (7, 8, 9):
                file.write(json.dumps(record | {"iteration": i}) + "\n")
        view = look(run)
        assert [warning for warning in view.warnings if "status" not in warning] == [
            "Consecutive updates skipped: 2; loss or gradient not finite.",
            "Updates skipped: 4; all rewards of every group were equal.",
            "90% of rollouts are truncated; if replies need more tokens, raise sampling.max_new_tokens.",
            "No new prompt in the last 3 iterations (no_edits).",
        ]
        assert view.curves["mixed groups"] == [0, 0, 0]


class TestLogs:
    def test_are_read_once(self, run, monkeypatch):
        tail = Tail(run, "metrics")
        assert len(tail.read().records) == 6 and tail.read() == ([], False)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"iteration": 7}\n{"iteration"')
            file.flush()
            assert tail.read() == ([{"iteration": 7}], False)
            file.write(": 8}\n")
        assert tail.read() == ([{"iteration": 8}], False)

    @pytest.mark.parametrize("grown", [False, True])
    def test_that_are_cut_back_are_read_again(self, grown, run):
        tail, file = Tail(run, "metrics"), run / "metrics.jsonl"
        tail.read()
        lines = file.read_text().splitlines(keepends=True)
        repeated = lines[:4] + [text.replace('"total":1', '"total":21') for text in lines[4:]] * grown
        file.write_text("".join(repeated))
        again = tail.read()
        assert again.again and again.records == [json.loads(text) for text in repeated]

    def test_a_long_line_and_separators_in_texts(self, tmp_path, monkeypatch):
        monkeypatch.setattr("espl_jax.watch.tail._CHUNK", 64)
        with WorkDir(tmp_path, {}) as folder:
            records = [{"text": "a\u2028b\r\x0b" * n} for n in (1, 100, 2, 300)]
            for record in records:
                folder.append("metrics", record)
            assert Tail(tmp_path, "metrics").read().records == records


class TestRendering:
    @pytest.mark.parametrize("width", [40, 60, 80, 200])
    def test_no_line_is_too_long(self, width, run):
        write_status(run)
        text = shown(look(run), width)
        assert max(map(len, text.splitlines())) <= width
        assert "reward" in text and "p6  31.00 ± 8.00" in text

    def test_numbers_are_whole_in_a_narrow_terminal(self, run):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(tracked.metrics(7) | {"loss": -4e-8}) + "\n")
        assert "-4.0e-08" in shown(look(run), 40)

    def test_texts_of_models_are_shown_as_they_are(self, run):
        """Neither markup nor escapes of theirs reach the terminal."""
        members = [dataclasses.asdict(dataclasses.replace(tracked.member(2), mu=99.0))]
        (run / "population.json").write_text(json.dumps({"max_size": 1, "created": 3, "members": members}))
        text = shown(look(run), 120)
        assert "[bold red]never mind[/] <script>alert(1)</script> \ufffd[31m ``` \ufffd end" in text
        assert "\x1b" not in text

    def test_safe(self):
        assert safe("a\x1b]0;t\x07b\n c\t\u202ed \ud800") == "a\ufffd]0;t\ufffdb c \ufffdd \ufffd"

    def test_sparkline(self):
        assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
        assert sparkline([0, 0, 7, 7], 2) == "▁█"
        assert sparkline([3, 3], 8) == "▄▄"
        assert sparkline([float("nan"), 1, 2], 8) == "▁█"
        assert sparkline([], 8) == "" and sparkline([1], 0) == ""
        assert len(sparkline(range(1000), 37)) == 37

    def test_number(self):
        assert [number(x) for x in (0, 0.5, 12.345, 123456, -1e-6)] == [
            "0.000",
            "0.500",
            "12.3",
            "1.2e+05",
            "-1.0e-06",
        ]


class TestCommand:
    def test_lines_where_there_is_no_terminal(self, run):
        write_status(run, state="finished")
        out = io.StringIO()
        watch(str(run), Console(file=out, width=60), once=False, interval=0.01)
        assert out.getvalue() == (
            "6 of 6 iterations  finished  reward 0.750  success 0.167  tokens per rollout 10.5  "
            "best prompt p6 (31.00 ± 8.00)\n"
        )

    def test_once(self, run):
        out = io.StringIO()
        watch(str(run), Console(file=out, width=60), once=True, interval=0.01)
        assert "Best prompts" in out.getvalue() and "Last edits" in out.getvalue()

    def test_on_a_terminal_until_the_end(self, run, monkeypatch):
        (run / "results.json").unlink()
        write_status(run, alive=2e9 * 2)
        sleeps = []

        def sleep(seconds):
            sleeps.append(seconds)
            if len(sleeps) == 3:
                write_status(run, state="stopped")

        monkeypatch.setattr("espl_jax.watch.__main__.time.sleep", sleep)
        out = io.StringIO()
        watch(str(run), Console(file=out, width=60, force_terminal=True), once=False, interval=0.5)
        assert sleeps == [0.5] * 3
        assert "running" in out.getvalue() and "stopped" in out.getvalue()

    def test_a_work_directory_that_cannot_be_read_for_a_moment(self, run, monkeypatch):
        (run / "results.json").unlink()
        write_status(run, alive=2e9 * 2)
        read, sleeps = LocalLog.read, []

        def sleep(seconds):
            sleeps.append(seconds)
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(tracked.metrics(6 + len(sleeps))) + "\n")
            if len(sleeps) == 2:
                write_status(run, state="stopped")

        def failing(self, begin, length):
            if len(sleeps) == 1:
                raise OSError("bucket: service unavailable")
            return read(self, begin, length)

        monkeypatch.setattr("espl_jax.watch.__main__.time.sleep", sleep)
        monkeypatch.setattr(LocalLog, "read", failing)
        out = io.StringIO()
        watch(str(run), Console(file=out, width=60), once=False, interval=0.5)
        first, failed, last, *_ = out.getvalue().splitlines()
        assert first.startswith("6 of 6 iterations  running") and last.startswith(
            "8 of 6 iterations  stopped"
        )
        assert failed == "! This is the last view that could be read: bucket: service unavailable"

    def test_does_not_need_jax(self, run, without_jax):
        done = without_jax("espl_jax.watch", f"--workdir={run}", "--once")
        assert done.returncode == 0 and "Best prompts" in done.stdout, done.stderr
        missing = without_jax("espl_jax.watch", f"--workdir={run}/none")
        assert missing.returncode == 1 and missing.stderr.startswith("ValueError: --workdir=")
        assert "Traceback" not in missing.stderr
