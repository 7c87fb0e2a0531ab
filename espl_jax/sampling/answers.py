"""Collects the answers appended to rows between turns. The first process decides when each one arrives."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from espl_jax.parallel import processes

GRACE = 0.1
"""Seconds to wait, after each chunk, for answers requested one chunk earlier.

Answers that arrive within that chunk plus this time are all appended together, in whatever order they arrive,
so a fast retriever's timing does not affect the batch layout or the rounding of logits. Slower answers are
appended when they arrive; other rows do not wait for them.
"""

Place = tuple[int, int, int]
"""A row's (m, b, n)."""

Respond = Callable[[Place, np.ndarray], Any]
"""Called with a row's place and all its tokens when the model ends a turn. Returns the tokens to append, an
empty list or None to end the row, or a `concurrent.futures.Future` of either."""


class Answers:
    """Requests answers and gathers those that have arrived.

    Arrival times differ between processes, so only the first process calls `respond`; it broadcasts the
    answers it has gathered to the others. Arrival times also differ between runs; see `GRACE`.

    Attributes:
      waiting: rows whose answer has not arrived.
    """

    def __init__(self, respond: Respond | None):
        """Stores the callback. Without `respond`, every row ends after its first turn."""
        self.waiting: set[int] = set()
        self._respond = respond
        # First process only: all pending answers, and those requested in the last call of `gather`.
        self._futures: dict[int, concurrent.futures.Future] = {}
        self._recent: list[concurrent.futures.Future] = []

    def gather(self, ended: Mapping[int, tuple[Place, np.ndarray]], wait: bool) -> dict[int, list[int]]:
        """Requests answers for the rows that ended a turn, and returns all answers that have arrived.

        Args:
          ended: rows whose turn the model has just ended, with the arguments for `respond`.
          wait: block until at least one row that was already waiting has its answer.

        Returns:
          Tokens to append to each answered row; an empty list ends the row.

        Raises:
          Exception: on every process, whatever `respond` or one of its futures raises.
        """
        if self._respond is None:
            return {row: [] for row in ended}
        if not (ended or self.waiting):
            return {}
        answers = processes.decide(lambda: self._arrived(ended, wait))
        self.waiting = (self.waiting | ended.keys()) - answers.keys()
        return answers

    def _arrived(self, ended: Mapping[int, tuple[Place, np.ndarray]], wait: bool) -> dict[int, list[int]]:
        respond = self._respond
        assert respond is not None
        answers = {row: respond(*turn) for row, turn in ended.items()}
        if wait:
            concurrent.futures.wait(self._futures.values(), return_when=concurrent.futures.FIRST_COMPLETED)
        concurrent.futures.wait(self._recent, timeout=GRACE)
        for row in [row for row, future in self._futures.items() if future.done()]:
            answers[row] = self._futures.pop(row).result()
        asked = {
            row: answer for row, answer in answers.items() if isinstance(answer, concurrent.futures.Future)
        }
        self._futures |= asked
        self._recent = list(asked.values())
        there = {row: answer for row, answer in answers.items() if row not in self._futures}
        return {
            row: [] if answer is None else [int(token) for token in answer] for row, answer in there.items()
        }
