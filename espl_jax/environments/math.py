"""Mathematics problems whose answer is an expression, judged by math-verify."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import math_verify
from math_verify.errors import TimeoutException

from espl_jax.environments import boxed
from espl_jax.types import Grade, Problem

ANSWER_FORMATS = ("boxed", "expression")

_FAILURES = (Exception, TimeoutException)
"""What math-verify may throw at odd input; its TimeoutException is no Exception."""


@dataclasses.dataclass(frozen=True)
class Math:
    r"""Reward 1 if the answer is equivalent to the gold one, else 0, as in the math tasks of the paper.

    An expression may be cheap to write and impossible to compare (towers of powers, huge sums), so
    math-verify works under a time limit, and an answer that exceeds it earns nothing. The limit is an alarm
    signal, which exists in the main thread only.

    Attributes:
      answer_format: `boxed` grades the content of the last `\boxed{...}`; `expression` leaves the choice of
        the final expression to math-verify, as the paper's released code does.
      instruction: said after the problem, in a paragraph of its own; None asks for a box where one is needed,
        and says nothing else.
      timeout: seconds for parsing an answer, and again for comparing it.

    Raises:
      ValueError: for an unknown answer_format, or a timeout that is not a positive whole number.
    """

    answer_format: str = "boxed"
    instruction: str | None = None
    timeout: int = 5

    def __post_init__(self):
        if self.answer_format not in ANSWER_FORMATS:
            raise ValueError(
                f"answer_format={self.answer_format!r} is unknown; choose one of {', '.join(ANSWER_FORMATS)}"
            )
        if not isinstance(self.timeout, int) or self.timeout < 1:
            raise ValueError(f"timeout={self.timeout!r} must be a whole number of seconds, at least 1")

    def user_message(self, problem: Problem) -> str:
        """The problem's text, and the instruction after a blank line."""
        instruction = self.instruction
        if instruction is None:
            instruction = boxed.INSTRUCTION if self.answer_format == "boxed" else ""
        return f"{problem.text}\n\n{instruction}".rstrip()

    def grade(self, problems: Sequence[Problem], replies: Sequence[str]) -> list[Grade]:
        """Grades of a batch, in order. Whatever math-verify fails on earns 0.

        Raises:
          RuntimeError: when called outside the main thread, where no time limit could be kept.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "Math.grade was called outside the main thread; its time limit works only there"
            )
        # Rollouts of one problem mostly repeat a few answers.
        known: dict[tuple[str, str | None], Grade] = {}
        grades = []
        for problem, reply in zip(problems, replies, strict=True):
            text = boxed.last_boxed(reply) if self.answer_format == "boxed" else reply
            key = (problem.answer, text)
            if key not in known:
                known[key] = Grade(0.0, False) if text is None else self._judge(problem.answer, text)
            grades.append(known[key])
        return grades

    def _judge(self, gold: str, text: str) -> Grade:
        """Grades the content of a box, or a whole reply."""
        if self.answer_format == "boxed":
            parsed, answer = self._parse(rf"\boxed{{{text}}}"), text
        else:
            parsed = self._parse(text)
            # Parsing gives an expression and the characters that it came from.
            answer = next((part for part in parsed if isinstance(part, str)), None)
        success = answer is not None and answer.strip() == gold.strip()
        if not success:
            success = self._equivalent(self._parse(rf"\boxed{{{gold}}}"), parsed)
        return Grade(float(success), success, answer)

    def _parse(self, text: str) -> list:
        try:
            return math_verify.parse(text, parsing_timeout=self.timeout, raise_on_error=True)
        except _FAILURES:
            return []

    def _equivalent(self, gold: list, answer: list) -> bool:
        try:
            return bool(math_verify.verify(gold, answer, timeout_seconds=self.timeout))
        except _FAILURES:
            return False
