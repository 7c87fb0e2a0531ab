"""Records, progress lines, intervals and tables."""

import io
import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.console.progress import Progress
from espl_jax.console.tables import duration, table
from espl_jax.rollouts.intervals import interval, proportion
from espl_jax.storage.workdir import WorkDir


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(num_iterations, durations, records, done=0):
    """A loop of two phases with the given seconds each; what it recorded and what it showed."""
    clock, recorded, shown = Clock(), [], io.StringIO()
    console = rich.console.Console(file=shown, width=60)
    with Progress(
        num_iterations,
        lambda log, record: recorded.append((log, record)),
        done=done,
        console=console,
        clock=clock,
    ) as progress:
        for i, (first, second) in enumerate(durations):
            for _ in range(2):
                with progress.phase("rollouts"):
                    clock.now += first / 2
            with progress.phase("update"):
                clock.now += second
            clock.now += 1.0
            progress.report(done + i + 1, records[i])
    return recorded, shown.getvalue()


def test_records_hold_the_clock_under_time():
    recorded, _ = run(
        2, [(4.0, 2.0), (3.0, 1.0)], [{"reward": 0.25, "time": {"sampled": 9.0}}, {"reward": 0.5}]
    )
    assert recorded == [
        (
            "metrics",
            {
                "iteration": 1,
                "reward": 0.25,
                "time": {"rollouts": 4.0, "update": 2.0, "sampled": 9.0, "total": 7.0},
            },
        ),
        ("metrics", {"iteration": 2, "reward": 0.5, "time": {"rollouts": 3.0, "update": 1.0, "total": 5.0}}),
    ]


def test_plain_lines():
    best = {"id": "p3", "mu": 27.125, "sigma": 2.0}
    records = [{"reward": 0.25}, {"reward": 0.5, "held_out": 0.42, "best_prompt": best}]
    _, shown = run(12, [(4.0, 2.0), (3.0, 1.0)], records, done=8)
    assert shown.splitlines() == [
        "  iteration 9/12: rollouts",
        "  iteration 9/12: rollouts",
        "  iteration 9/12: update",
        "iteration 9/12  reward 0.250  7.0 s  21.0 s left",
        "  iteration 10/12: rollouts",
        "  iteration 10/12: rollouts",
        "  iteration 10/12: update",
        "iteration 10/12  reward 0.500  held out 0.420  best prompt p3 (27.12 ± 2.00)  5.0 s  12.0 s left",
    ]


def test_one_slow_iteration_does_not_rule_the_time_left():
    _, shown = run(10, [(99.0, 0.0), (1.0, 0.0), (1.0, 0.0)], [{"reward": 0.0}] * 3)
    assert shown.splitlines()[-1].endswith("2.0 s  14.0 s left")


def test_phase_counts_when_it_fails_and_nests():
    clock, recorded = Clock(), []
    console = rich.console.Console(file=io.StringIO())
    with Progress(1, lambda log, record: recorded.append(record), console=console, clock=clock) as progress:
        with pytest.raises(KeyError), progress.phase("evaluation"), progress.phase("rollouts"):
            clock.now += 3.0
            raise KeyError
        progress.report(1, {"reward": 1.0})
    assert recorded[0]["time"] == {"evaluation": 3.0, "rollouts": 3.0, "total": 3.0}


def test_a_listener_hears_of_phases_and_iterations():
    heard = []
    console = rich.console.Console(file=io.StringIO())
    listen = lambda phases, done: heard.append((phases, done))  # noqa: E731
    with Progress(4, lambda log, record: None, done=2, console=console, listen=listen) as progress:
        with progress.phase("evaluation"), progress.phase("rollouts"):
            pass
        progress.report(3, {"reward": 1.0})
    assert heard == [
        ((), 2),
        (("evaluation",), 2),
        (("evaluation", "rollouts"), 2),
        (("evaluation",), 2),
        ((), 2),
        ((), 3),
    ]


def test_text_is_shown_as_it_is():
    shown = io.StringIO()
    progress = Progress(1, lambda log, record: None, console=rich.console.Console(file=shown, width=20))
    progress.say("[bold]a box[/bold] \\boxed{7} " + "long " * 20)
    assert shown.getvalue() == "[bold]a box[/bold] \\boxed{7} " + "long " * 20 + "\n"


def test_work_directory_takes_the_records(tmp_path):
    with WorkDir(tmp_path, {}) as workdir:
        console = rich.console.Console(file=io.StringIO())
        with Progress(1, workdir.append, console=console) as progress:
            progress.report(1, {"reward": 0.5})
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record.pop("time").keys() == {"total"}
    assert record == {"iteration": 1, "reward": 0.5}


LOOP = """
import time
from espl_jax.console.progress import Progress
with Progress(2, lambda log, record: None) as progress:
    for iteration in (1, 2):
        with progress.phase("rollouts"):
            time.sleep(0.2)
        progress.report(iteration, {"reward": 0.5, "best_prompt": {"id": "p1", "mu": 25.0, "sigma": 8.0}})
    raise SystemExit(3)
"""


def test_live_display_on_a_terminal():
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP], stdout=end, stderr=end, env=environment, cwd=root
    )
    os.close(end)
    shown = b""
    while select.select([terminal], [], [], 30)[0]:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
    os.close(terminal)
    assert process.wait(timeout=30) == 3, shown
    text = shown.decode()
    assert "iteration 2/2  reward 0.500  best prompt p1 (25.00 ± 8.00)" in text
    assert "iteration 1/2: rollouts" not in text  # phases are in the bar there
    assert "rollouts  reward 0.500  best prompt p1 (25.00 ± 8.00)  0.2 s left" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (119.7, "2 min 00 s"),
        (3599.6, "1 h 00 min"),
        (7625, "2 h 07 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_interval_by_hand():
    # n = 10, s = 8, z^2 = 3.8415: center 9.92073 / 13.8415 = 0.71674; half width
    # 1.95996 * sqrt(1.6 + 0.96036) / 13.8415 = 0.22658.
    assert interval(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)  # upper end: z^2 / (n + z^2)
    assert proportion(8, 10) == "80.0% [49.0, 94.3]"


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_holds_the_proportion_and_mirrors(counts):
    successes, n = counts
    low, high = interval(successes, n)
    assert 0 <= low <= successes / n + 1e-12 and successes / n - 1e-12 <= high <= 1
    assert interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_interval_refuses(successes, n):
    with pytest.raises(ValueError, match=f"successes={successes}, n={n}"):
        interval(successes, n)


def test_table():
    rows = [["weights", "root", "deployed [p3]"], ["initial", "6.0%", "9.5%"], ["trained", "61.0%", "70.5%"]]
    assert table(rows).splitlines() == [
        "| weights |  root | deployed [p3] |",
        "|---------|-------|---------------|",
        "| initial |  6.0% |          9.5% |",
        "| trained | 61.0% |         70.5% |",
    ]
