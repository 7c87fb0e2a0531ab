"""What is said to rows between their turns, and when: the first of several processes knows, and tells."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from espl_jax.parallel import processes

GRACE = 0.1
"""Seconds that rows are held up for answers that were asked for one look ago and have not arrived.

What arrives within them and the chunk before is taken at the same look, whatever the order: the layout of
rows, and so the rounding of their logits, does not depend on a retriever's timing unless that is slower.
Answers that come later are taken as they come, and nobody waits for them.
"""

Place = tuple[int, int, int]
"""A row's (m, b, n)."""

Respond = Callable[[Place, np.ndarray], Any]
"""A row's place and all its tokens, when a turn has ended by itself. Returns the tokens to append, none (or
None) to end the row, or a `concurrent.futures.Future` of them."""


class Answers:
    """Asks for answers, and gathers those that have arrived.

    When an answer arrives differs from process to process. So the first one alone calls `respond`, and what
    it has gathered is what all of them have. When it arrives differs from run to run, too; see `GRACE`.

    Attributes:
      waiting: rows whose answer has not arrived.
    """

    def __init__(self, respond: Respond | None):
        """Without `respond` every turn is the last."""
        self.waiting: set[int] = set()
        self._respond = respond
        # Of the first process: what has not arrived, and of that what was asked for at the last look.
        self._futures: dict[int, concurrent.futures.Future] = {}
        self._recent: list[concurrent.futures.Future] = []

    def gather(self, ended: Mapping[int, tuple[Place, np.ndarray]], wait: bool) -> dict[int, list[int]]:
        """Asks for these rows, and returns what is there for them or for those asked for before.

        Args:
          ended: rows whose turn has ended by itself, with what `respond` is called with.
          wait: whether at least one row that waited before is to be among the answers.

        Returns:
          Tokens to append to each row; none ends it.

        Raises:
          What `respond` or one of its futures raises, on every process.
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
