"""What runs in a grading process: one question a line comes in, one reply a line goes out.

The process itself never looks at an answer. It imports its judge once, and leaves every question to a fork
of its own, which starts in milliseconds, has a limit of time and of memory, and ends with its one reply. So
no answer is graded after another one in the same process, and the same question has the same reply always.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, Protocol

READY = b"ready\n"
"""Written once, when questions may come."""


class Judge(Protocol):
    """A module that judges answers, such as `equivalence`."""

    def warm_up(self) -> None:
        """Is called once, before the first question."""
        ...

    def prepare(self, rule: str, gold: str) -> None:
        """Is called before each question, in the process itself and without limits; forks see its effects."""
        ...

    def judge(self, rule: str, gold: str, answer: str) -> tuple[bool, str | None]:
        """Whether an answer is right, and the text of the verdict, see `workers.Verdict`. Runs in a fork."""
        ...


def main() -> None:
    """Serves until standard input ends.

    The command line gives the module of the judge, and seconds and MiB that one question may take. A question
    is a JSON list of the rule, the gold answer and the answer, as the judge takes them; its reply is a JSON
    list of whether the answer is right, a text, and an outcome, see `workers.Verdict`.
    """
    judge: Any = importlib.import_module(sys.argv[-3])
    timeout, memory_mib = float(sys.argv[-2]), int(sys.argv[-1])
    questions, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    # What a library prints is no reply.
    os.dup2(null, 0)
    os.dup2(null, 1)
    with contextlib.suppress(OSError):
        # If the machine runs out of memory, a grader is what it can do without.
        Path("/proc/self/oom_score_adj").write_text("1000")
    judge.warm_up()
    gc.collect()
    gc.freeze()
    os.write(replies, READY)
    os.dup2(null, 2)
    with os.fdopen(questions, "rb") as lines:
        for line in lines:
            os.write(replies, _in_a_fork(judge, line, timeout, memory_mib << 20) + b"\n")


def _in_a_fork(judge: Judge, question: bytes, timeout: float, memory: int) -> bytes:
    """The reply to one question, from a process that is dead when this returns."""
    rule, gold, answer = json.loads(question)
    try:
        judge.prepare(rule, gold)
    except Exception:
        return json.dumps([False, None, "error"]).encode()
    deadline = time.monotonic() + timeout
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        try:
            _limit(timeout, memory)
            os.write(sink, json.dumps(_reply(judge, rule, gold, answer)).encode())
        finally:
            os._exit(0)
    os.close(sink)
    reply, ended = b"", False
    while not ended and select.select([source], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(source, 1 << 16)
        reply, ended = reply + part, not part
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(source)
    if reply.endswith(b"]"):
        return reply
    return json.dumps([False, None, "died" if ended else "timeout"]).encode()


def _reply(judge: Judge, rule: str, gold: str, answer: str) -> list[Any]:
    try:
        return [*judge.judge(rule, gold, answer), "graded"]
    except Exception:
        return [False, None, "error"]


def _limit(timeout: float, memory: int) -> None:
    """Limits of this process that the system keeps, whatever it is busy with."""
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        # Not every system has all of them: macOS has no limit of memory.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))
    # The alarm ends this process even where its parent has died and nobody else will.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout + 1)
