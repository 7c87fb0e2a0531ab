"""Measures the math grader's accuracy, and its time on hostile answers: the tables of docs/grading.md.

    python -m experiments.grading_table

The answer pairs and the hostile answers are those of tests/environments/answers.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import tempfile
import time
from pathlib import Path

from espl_jax.console.tables import table
from espl_jax.environments import boxed
from espl_jax.environments.grading.workers import Workers
from espl_jax.environments.math import LONGEST_ANSWER
from tests.environments.answers import hostile
from tests.environments.answers.pairs import PAIRS

GOLD = r"\frac{41}{7}"
"""The reference answer for hostile answers."""

OUTCOMES = ("unasked", "graded", "error", "timeout", "died", "failed")
"""The outcomes of `Verdict`, and `unasked`: no boxed answer, or too long an answer for a grading process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for one answer")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--memory_mib", type=int, default=512, help="MiB for one answer")
    flags = parser.parse_args()
    print(start(flags))
    workers = Workers(flags.workers, flags.timeout, flags.memory_mib)
    print(pairs_table(workers))
    print(f"answers a second before: {throughput(workers):.1f}")
    print(hostile_table(workers))
    print(f"answers a second after: {throughput(workers):.1f}")
    workers.close()


def start(flags: argparse.Namespace) -> str:
    """Measures the seconds until the first verdict of a new process, and its memory."""
    began = time.perf_counter()
    workers = Workers(1, flags.timeout, flags.memory_mib)
    workers.submit("boxed", "5", "10/2").result()
    seconds = time.perf_counter() - began
    (pid,) = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    sizes = [int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmSize")]
    workers.close()
    return (
        f"first verdict after {seconds:.2f} s; resident {sizes[0]:.0f} MiB, address space {sizes[1]:.0f} MiB"
    )


def pairs_table(workers: Workers) -> str:
    """Formats, for each category, the number of pairs and of false verdicts as a Markdown table."""
    rows, totals = [], collections.Counter()
    for category, entries in PAIRS.items():
        counts = collections.Counter()
        for gold, answer, right in entries:
            success = answer == gold or workers.submit("boxed", gold, answer).result().success
            counts[right] += 1
            counts["rejects" if right else "accepts"] += success != right
        rows.append([category, *(str(counts[key]) for key in (True, "rejects", False, "accepts"))])
        totals += counts
    rows.append(["all", *(str(totals[key]) for key in (True, "rejects", False, "accepts"))])
    return table([["answers", "right", "falsely rejected", "wrong", "falsely accepted"], *rows])


def hostile_table(workers: Workers) -> str:
    """Formats, for each kind of hostile answer, the count, slowest time and outcomes as a Markdown table."""
    kinds: dict[str, list[tuple[float, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "marker"
        for kind, reply in hostile.replies(marker=str(marker)):
            began = time.perf_counter()
            answer = boxed.last_boxed(reply)
            if answer is None or len(answer) > LONGEST_ANSWER:
                kinds.setdefault(kind, []).append((time.perf_counter() - began, "unasked"))
                continue
            verdict = workers.submit("boxed", GOLD, answer).result()
            assert not verdict.success, (kind, reply[:100])
            kinds.setdefault(kind, []).append((time.perf_counter() - began, verdict.outcome))
        assert not marker.exists()
    rows = []
    for kind, results in [*kinds.items(), ("all", [each for some in kinds.values() for each in some])]:
        ended = collections.Counter(outcome for _, outcome in results)
        counts = [str(ended[outcome]) for outcome in OUTCOMES]
        rows.append([kind, str(len(results)), f"{max(results)[0]:.2f} s", *counts])
    return table([["hostile", "count", "slowest", *OUTCOMES], *rows])


def throughput(workers: Workers, count: int = 100, times: int = 3) -> float:
    """Measures graded answers per second, the best of `times` runs."""
    questions = [
        ("boxed", rf"\frac{{{n}}}{{\sqrt{{7}}}}", rf"\frac{{{n}\sqrt7}}{{7}}") for n in range(1, count + 1)
    ]
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        futures = [workers.submit(*question) for question in questions]
        assert all(future.result().success for future in futures)
        seconds.append(time.perf_counter() - began)
    return count / min(seconds)


if __name__ == "__main__":
    main()
