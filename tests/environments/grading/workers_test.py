import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import pytest

from espl_jax.environments.grading import workers as module
from espl_jax.environments.grading.workers import Verdict, Workers

MONSTER = "(" * 900 + "5" + ")" * 900
RIGHT = Verdict(True, "10/2", "graded")


@pytest.fixture(scope="module")
def workers():
    workers = Workers(count=1, timeout=20, memory_mib=1024)
    yield workers
    workers.close()


def children(pid=None):
    """Processes of the grading that descend from a process, by id."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[1]) == (pid or os.getpid()) and stat[0] != "Z":
                found.append(int(entry))
    return found


def grading(pid=None):
    return [each for each in children(pid) if b"grading" in command_line(each)]


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:  # ended since it was listed
        return b""


def eventually(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def ask(workers, answer="10/2", gold="5"):
    return workers.submit("boxed", gold, answer).result(timeout=200)


@pytest.fixture
def yes(monkeypatch):
    """Processes that say yes to everything, and are ready at once."""
    code = (
        "print('ready', flush=True)\nfor line in sys.stdin: print('[true, \"10/2\", \"graded\"]', flush=True)"
    )
    monkeypatch.setattr(module, "_BOOT", f"import sys  # grading\n{code}")


def test_processes_start_with_the_first_question_and_end_with_close(yes):
    before = grading()
    workers = Workers(count=2, timeout=20, memory_mib=1024)
    assert grading() == before
    assert ask(workers) == RIGHT
    assert len(grading()) == len(before) + 1
    workers.close()
    assert eventually(lambda: grading() == before)
    assert ask(workers) == RIGHT
    workers.close()
    assert eventually(lambda: grading() == before)


def test_processes_end_with_the_object(yes):
    before = grading()
    workers = Workers(count=1, timeout=20, memory_mib=1024)
    assert ask(workers) == RIGHT
    del workers
    gc.collect()
    assert eventually(lambda: grading() == before)


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_process_that_dies_or_stops_is_replaced(yes, signal_, monkeypatch):
    monkeypatch.setattr(module, "SLACK", 0.0)
    before = grading()
    workers = Workers(count=1, timeout=3, memory_mib=1024)
    assert ask(workers).success
    (pid,) = set(grading()) - set(before)
    os.kill(pid, signal_)
    assert ask(workers, "15/3").success
    assert pid not in grading()
    workers.close()


@pytest.mark.slow
def test_limits_are_kept_even_if_the_process_dies_within_a_question():
    before = grading()
    workers = Workers(count=1, timeout=1, memory_mib=1024)
    assert ask(workers).success
    (pid,) = set(grading()) - set(before)
    future = workers.submit("boxed", "5", MONSTER)
    assert eventually(lambda: children(pid))
    os.kill(pid, signal.SIGKILL)
    assert future.result(timeout=200) == Verdict(False, None, "timeout")
    assert ask(workers, "15/3").success
    workers.close()


@pytest.mark.parametrize(
    "says",
    [
        "print('no JSON', flush=True)",
        "print('[true]', flush=True)",
        "print('[1, null, \"graded\"]', flush=True)",
        'print(\'[true, null, "graded"]\\n[true, null, "graded"]\', flush=True)',
        "print('x' * 5_000_000, flush=True)",
        "sys.exit(3)",
        "os.close(0); os.close(1); time.sleep(60)",
        "time.sleep(60)",
    ],
)
def test_junk_fails_the_question_and_nothing_else(monkeypatch, says):
    code = f"import os, sys, time\nprint('ready', flush=True)\nfor line in sys.stdin: {says}"
    monkeypatch.setattr(module, "_BOOT", code)
    monkeypatch.setattr(module, "SLACK", 0.2)
    workers = Workers(count=1, timeout=0.2, memory_mib=1024)
    assert ask(workers) == Verdict(False, None, "failed")
    workers.close()


def test_questions_that_nobody_reads_are_given_up(monkeypatch):
    monkeypatch.setattr(module, "_BOOT", "import time; print('ready', flush=True); time.sleep(60)")
    monkeypatch.setattr(module, "SLACK", 0.1)
    workers = Workers(count=1, timeout=0.1, memory_mib=1024)
    assert ask(workers, "5" * 10_000_000) == Verdict(False, None, "failed")
    workers.close()


def test_no_process_at_all_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setattr(module, "_BOOT", "raise SystemExit('no math-verify here')")
    workers = Workers(count=1, timeout=1, memory_mib=1024)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no math-verify here"):
            ask(workers)
    workers.close()


def test_many_threads_may_ask(workers):
    futures = []

    def submit(gold):
        futures.append((gold, workers.submit("boxed", str(gold), f"{2 * gold}/2")))
        futures.append((None, workers.submit("boxed", str(gold), f"{2 * gold}/3")))

    threads = [threading.Thread(target=submit, args=(gold,)) for gold in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait([future for _, future in futures], timeout=200)
    assert all(future.result().success == (gold is not None) for gold, future in futures)


PARENT = """
import sys, time
from espl_jax.environments.grading.workers import Workers
workers = Workers(count=1, timeout={timeout}, memory_mib=1024)
assert workers.submit("boxed", "5", "10/2").result().success
future = workers.submit("boxed", "5", {answer!r})
assert not {{"jax", "sympy", "math_verify", "numpy.random"}} & set(sys.modules), sorted(sys.modules)
print("started", flush=True)
{end}
"""


def start_parent(answer, timeout, end):
    code = PARENT.format(answer=answer, timeout=timeout, end=end)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "started\n"
    return parent


@pytest.mark.slow
def test_nothing_outlives_a_parent_that_is_killed():
    parent = start_parent(MONSTER, 2, "time.sleep(100)")
    (pid,) = grading(parent.pid)
    eventually(lambda: children(pid))
    family = [pid, *children(pid)]
    parent.kill()
    parent.wait()
    assert eventually(lambda: not any(os.path.exists(f"/proc/{each}/exe") for each in family))


@pytest.mark.slow
def test_a_fork_ends_even_if_the_process_that_keeps_its_limits_is_killed_too():
    parent = start_parent(MONSTER, 2, "time.sleep(100)")
    (pid,) = grading(parent.pid)
    assert eventually(lambda: children(pid))
    family = [pid, *children(pid)]
    parent.kill()
    os.kill(pid, signal.SIGKILL)
    parent.wait()
    assert eventually(lambda: not any(os.path.exists(f"/proc/{each}/exe") for each in family))


def test_unfinished_questions_do_not_keep_the_interpreter():
    parent = start_parent(MONSTER, 1000, "")
    assert parent.wait(timeout=100) == 0


def test_neither_main_nor_jax_is_imported_by_a_process(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('jax was imported')")
    script = tmp_path / "script.py"
    script.write_text(
        f"print('main')\nimport sys\nsys.path.append({str(module._ROOT)!r})\n"
        "from espl_jax.environments.grading.workers import Workers\n"
        "print(Workers(1, 20, 1024).submit('boxed', '5', '10/2').result().success)\n"
    )
    run = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["main", "True"], run.stderr


def test_what_is_sent_is_one_line():
    question = ["boxed", "5\n5", "\ud800\x00\r\n{"]
    line = json.dumps(question).encode()
    assert b"\n" not in line and json.loads(line) == question
