"""Verdicts that are remembered."""

from __future__ import annotations

import collections
import threading
from concurrent.futures import Future

from espl_jax.environments.grading.workers import Verdict, Workers

ENTRIES = 10_000
"""Most verdicts remembered; the one that was not asked for the longest goes first."""


class CachedWorkers:
    """`Workers` that are asked once for each question, however it ended: a timeout is remembered, too."""

    def __init__(self, workers: Workers, entries: int = ENTRIES):
        self._workers = workers
        self._entries = entries
        self._lock = threading.Lock()
        self._known: collections.OrderedDict[tuple[str, str, str], Future[Verdict]] = (
            collections.OrderedDict()
        )

    def submit(self, rule: str, gold: str, answer: str) -> Future[Verdict]:
        """As `Workers.submit`, or the future of the same question asked before."""
        question = rule, gold, answer
        with self._lock:
            known = self._known.get(question)
            if known is None or (known.done() and known.exception()):
                self._known[question] = self._workers.submit(*question)
            self._known.move_to_end(question)
            while len(self._known) > self._entries:
                self._known.popitem(last=False)
            return self._known[question]

    def close(self) -> None:
        """Ends the processes and forgets everything."""
        with self._lock:
            self._known.clear()
            self._workers.close()
