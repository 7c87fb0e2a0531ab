"""Mathematics problems whose answer is an expression, judged by math-verify in processes of its own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from concurrent.futures import Future

from espl_jax.environments import boxed
from espl_jax.environments.grading.cached import CachedWorkers
from espl_jax.environments.grading.workers import Verdict, Workers
from espl_jax.types import Grade, Problem

ANSWER_FORMATS = ("boxed", "expression")

LONGEST_ANSWER = 2_000
"""Characters of a box; what is longer is wrong unless it is the gold answer, letter by letter."""

LONGEST_REPLY = 20_000
"""Characters at the end of a reply in which `expression` looks for the answer."""

_WRONG = "The answer that was read, {}, is wrong."

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


@dataclasses.dataclass(frozen=True)
class Math:
    r"""Reward 1 if the answer is equivalent to the gold one, else 0, as in the math tasks of the paper.

    An expression may be cheap to write and impossible to compare (towers of powers, huge sums). Answers are
    therefore compared in processes that are killed at a limit of time or memory, and an answer that exceeds
    it earns nothing. The processes start with the first answer that needs them, and end with this object or
    at `close`. The rules of equivalence are in `espl_jax.environments.grading`.

    Attributes:
      answer_format: `boxed` grades the content of the last `\boxed{...}`; `expression` leaves the choice of
        the final expression, and what equals it, to math-verify, as the paper's released code does.
      instruction: said after the problem, in a paragraph of its own; None asks for a box where one is needed,
        and says nothing else.
      timeout: seconds for one answer.
      workers: processes.
      memory_mib: MiB of address space for one answer.

    Raises:
      ValueError: for an unknown answer_format, and limits that are not positive.
    """

    answer_format: str = "boxed"
    instruction: str | None = None
    timeout: float = 5.0
    workers: int = 2
    memory_mib: int = 512
    _verdicts: CachedWorkers = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.answer_format not in ANSWER_FORMATS:
            raise ValueError(
                f"answer_format={self.answer_format!r} is unknown; choose one of {', '.join(ANSWER_FORMATS)}"
            )
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout={self.timeout!r}: give seconds, more than 0")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers!r}: give at least 1 process")
        if self.memory_mib < 256:
            raise ValueError(
                f"memory_mib={self.memory_mib!r}: math-verify alone needs more; give at least 256"
            )
        workers = Workers(self.workers, self.timeout, self.memory_mib)
        object.__setattr__(self, "_verdicts", CachedWorkers(workers))

    def user_message(self, problem: Problem) -> str:
        """The problem's text, and the instruction after a blank line."""
        instruction = self.instruction
        if instruction is None:
            instruction = boxed.INSTRUCTION if self.answer_format == "boxed" else ""
        return f"{problem.text}\n\n{instruction}".rstrip()

    def begin(self, problem: Problem, reply: str) -> None:
        """Starts to grade a reply, and does not wait. From any thread.

        `grade` gives the same grades with and without it, sooner with it.
        """
        self._begin(problem, reply)

    def grade(self, problems: Sequence[Problem], replies: Sequence[str]) -> list[Grade]:
        """Grades of a batch, in order. What cannot be parsed or compared within the limits earns 0.

        Raises:
          RuntimeError: if no process for grading can be started.
        """
        begun = [self._begin(problem, reply) for problem, reply in zip(problems, replies, strict=True)]
        return [
            max((self._finished(problem, each) for each in golds), key=lambda grade: grade.reward)
            for problem, golds in zip(problems, begun, strict=True)
        ]

    def close(self) -> None:
        """Ends the processes; they start again if another answer is graded."""
        self._verdicts.close()

    def _begin(self, problem: Problem, reply: str) -> list[Grade | tuple[str | None, Future[Verdict]]]:
        """For each answer that would be right, what `_compare` says."""
        return [self._compare(gold.strip(), reply) for gold in (problem.answer, *problem.aliases)]

    def _compare(self, gold: str, reply: str) -> Grade | tuple[str | None, Future[Verdict]]:
        """The grade where it is plain, else the answer and its verdict to come."""
        if self.answer_format == "expression":
            reply = reply[-LONGEST_REPLY:]
            return None, self._verdicts.submit("expression", gold, reply)
        text = boxed.last_boxed(reply)
        if text is None:
            return Grade(0.0, False, feedback=boxed.NO_BOX)
        if text == gold:
            return Grade(1.0, True, text)
        shown = text[:LONGEST_ANSWER]
        if len(text) > LONGEST_ANSWER:
            too_long = f"The box holds {len(text)} characters; it has to hold the final answer alone."
            return Grade(0.0, False, shown, feedback=too_long)
        if _INTEGER.fullmatch(text) and _INTEGER.fullmatch(gold):
            return Grade(0.0, False, shown, feedback=_WRONG.format(text))
        return text, self._verdicts.submit("boxed", gold, text)

    def _finished(self, problem: Problem, begun: Grade | tuple[str | None, Future[Verdict]]) -> Grade:
        if isinstance(begun, Grade):
            return begun
        text, verdict = begun[0], begun[1].result()
        if self.answer_format == "expression" and verdict.answer is not None:
            text = verdict.answer[:LONGEST_ANSWER]
        feedback = "" if verdict.success else self._why_wrong(problem, text, verdict)
        return Grade(float(verdict.success), verdict.success, text, feedback=feedback)

    def _why_wrong(self, problem: Problem, text: str | None, verdict: Verdict) -> str:
        if verdict.outcome == "timeout":
            return f"The answer could not be evaluated within {self.timeout:g} seconds; simplify it."
        if verdict.outcome != "graded":
            return "The answer could not be evaluated; write it as one plain expression."
        if text is None or verdict.answer is None:
            return "No mathematical expression could be read as the answer."
        wrong = _WRONG.format(text)
        is_integer = _INTEGER.fullmatch(problem.answer.strip())
        return f"{wrong} It has to be an integer." if is_integer and not _INTEGER.fullmatch(text) else wrong
