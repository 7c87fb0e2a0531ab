"""A pool of grading processes, and threads that wait for them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from concurrent.futures import Future
from pathlib import Path

from espl_jax.environments import grading

START_LIMIT = 120.0
"""Seconds until a process has to be ready; it takes about one on a machine with nothing else to do."""

SLACK = 5.0
"""Seconds beyond the limit of an answer after which its process, which keeps that limit, is given up."""

EQUIVALENCE = "espl_jax.environments.grading.equivalence"
"""The module that judges answers to problems of mathematics."""

ATTEMPTS = 3
"""Processes that may fail on one answer before it counts as wrong."""

_LONGEST_REPLY = 1 << 20
_ROOT = Path(grading.__file__).resolve().parents[3]
_READY = b"ready"
# -P: the folder of the module, which has a math.py, must not come before the standard library.
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from espl_jax.environments.grading.process import main; main()"
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a question.

    Attributes:
      success: whether the answer is right; False for whatever could not be graded.
      answer: what the judge adds: the answer as it was read, or its score as a number; or None.
      outcome: `graded`; `error` (what is written makes no sense, or takes too much memory); `timeout`; `died`
        (the interpreter crashed, or the system killed it); or `failed`, where the processes broke that keep
        these limits.
    """

    success: bool
    answer: str | None
    outcome: str


class Workers:
    """Judges answers in processes of their own, each within its limits, for callers in any thread.

    Processes are started by the first questions, and by the first ones after `close`. They end when this
    object is closed or collected, and when this process ends, however it does. This is not multiprocessing,
    nor pebble on top of it: to start a process without a fork of this one, which runs JAX's threads, both
    import `__main__` again in it, and with a training run's that is JAX.

    Args:
      count: processes.
      timeout: seconds for one answer.
      memory_mib: MiB of address space for one answer.
      judge: the module that judges, see `process.Judge`.
      slack: seconds for `Judge.prepare`, beyond the limit of an answer; None for `SLACK`.
    """

    def __init__(
        self,
        count: int,
        timeout: float,
        memory_mib: int,
        judge: str = EQUIVALENCE,
        slack: float | None = None,
    ):
        self._settings = timeout, memory_mib, judge, slack
        self._count = count
        self._lock = threading.Lock()
        self._start()

    def submit(self, rule: str, gold: str, answer: str) -> Future[Verdict]:
        """Begins to judge an answer. The future raises RuntimeError if no process can be started.

        Args:
          rule, gold, answer: as the judge takes them.
        """
        future: Future[Verdict] = Future()
        with self._lock:
            self._questions.put(([rule, gold, answer], future))
            if self._threads < self._count:
                self._threads += 1
                arguments = self._questions, *self._settings
                threading.Thread(target=_work, args=arguments, name="grading", daemon=True).start()
        return future

    def close(self) -> None:
        """Ends the processes when they have answered what was asked so far."""
        with self._lock:
            self._finalizer()
            self._start()

    def _start(self) -> None:
        self._questions: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = 0
        # The threads know the queue alone, so that they do not keep this object.
        self._finalizer = weakref.finalize(self, _end, self._questions, self._count)


def _end(questions: queue.SimpleQueue, count: int) -> None:
    for _ in range(count):
        questions.put(None)


def _work(
    questions: queue.SimpleQueue, timeout: float, memory_mib: int, judge: str, slack: float | None
) -> None:
    """What a thread does: passes questions to a process, and replaces it when it fails."""
    process = None
    while (item := questions.get()) is not None:
        question, future = item
        verdict = None
        try:
            for _ in range(ATTEMPTS):
                process = process or _Process(timeout, memory_mib, judge, slack)
                verdict = process.ask(question)
                if verdict is not None:
                    break
                process.end()
                process = None
            future.set_result(verdict or Verdict(False, None, "failed"))
        except Exception as error:
            future.set_exception(error)
    if process is not None:
        process.end()


class _Process:
    """One grading process, spoken to by one thread; never waited for longer than its limits."""

    def __init__(self, timeout: float, memory_mib: int, judge: str, slack: float | None):
        """Starts it. Raises RuntimeError if it does not get ready."""
        self._limit = timeout + (SLACK if slack is None else slack)
        self._received = b""
        with tempfile.TemporaryFile() as errors:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, str(_ROOT), judge, str(timeout), str(memory_mib)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                # Sets have the same order in every process.
                env={**os.environ, "PYTHONHASHSEED": "0"},
                # An interrupt from the keyboard is for the run alone.
                start_new_session=True,
            )
            assert self._popen.stdin is not None and self._popen.stdout is not None
            self._stdin, self._stdout = self._popen.stdin, self._popen.stdout
            for pipe in (self._stdin, self._stdout):
                os.set_blocking(pipe.fileno(), False)
            if self._receive(time.monotonic() + START_LIMIT) != _READY:
                self.end()
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()[-2000:]
                raise RuntimeError(
                    f"no process for grading could be started with {sys.executable}; it ended with "
                    f"{self._popen.returncode} and said: {said or 'nothing'}"
                )

    def ask(self, question: list[str]) -> Verdict | None:
        """The verdict, or None if the process died, does not react, or says what is no reply."""
        deadline = time.monotonic() + self._limit
        try:
            self._send(json.dumps(question).encode() + b"\n", deadline)
            success, answer, outcome = json.loads(self._receive(deadline))
        except (OSError, ValueError, TypeError):
            return None
        if type(success) is not bool or not isinstance(answer, str | None) or not isinstance(outcome, str):
            return None
        # More than was asked for would be taken for the next reply.
        return None if self._received else Verdict(success, answer, outcome)

    def end(self) -> None:
        self._popen.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(SLACK)
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def _send(self, data: bytes, deadline: float) -> None:
        pipe = self._stdin.fileno()
        while data:
            self._wait([], [pipe], deadline)
            data = data[os.write(pipe, data) :]

    def _receive(self, deadline: float) -> bytes:
        """The next line, without its end; what there is if the process ends or says too much."""
        pipe = self._stdout.fileno()
        while b"\n" not in self._received and len(self._received) < _LONGEST_REPLY:
            try:
                self._wait([pipe], [], deadline)
            except TimeoutError:
                return b""
            part = os.read(pipe, 1 << 16)
            if not part:
                return b""
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _wait(self, reading: list[int], writing: list[int], deadline: float) -> None:
        """Until one is ready. Raises TimeoutError, an OSError, at the deadline."""
        poll = select.poll()
        for pipe in reading:
            poll.register(pipe, select.POLLIN)
        for pipe in writing:
            poll.register(pipe, select.POLLOUT)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError("the grading process does not react")
