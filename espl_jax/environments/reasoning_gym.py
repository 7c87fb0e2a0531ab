"""Tasks of the package reasoning-gym, each scored by the package's own rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future

from espl_jax import gym
from espl_jax.environments import boxed
from espl_jax.environments.grading.cached import CachedWorkers
from espl_jax.environments.grading.workers import Verdict, Workers
from espl_jax.environments.gym_feedback import FEEDBACK
from espl_jax.types import Grade, Problem

INSTRUCTIONS = {
    "tag": "Put the final answer, and nothing else, between <answer> and </answer>.",
    "boxed": boxed.INSTRUCTION,
    "last_line": "Put the final answer, and nothing else, on the last line.",
}
"""Answer format -> what is said after the problem."""

_MISSING = {
    "tag": "There is no answer between tags. The answer has to be written as <answer>...</answer>.",
    "boxed": boxed.NO_BOX,
    "last_line": "The reply is empty. The answer has to be on its last line.",
}
_WHERE = {
    "tag": "between <answer> and </answer>",
    "boxed": r"in \boxed{...}",
    "last_line": "on the last line",
}

LONGEST_ANSWER = 20_000
"""Characters of an answer; what is longer earns nothing."""

LITTLE = 0.1
"""Feedback calls scores below this wrong: many tasks give 0.01 or 0.05 for any reply."""

_SHOWN = 2_000
_PREPARATION = 120.0
"""Seconds in which a grading process has to generate an entry."""


@dataclasses.dataclass(frozen=True)
class ReasoningGym:
    r"""The reward is the package's score of the answer, between 0 and 1; a score of 1 is a success.

    A problem is generated again from its id, see `espl_jax.gym`, so problems have to come from a data spec
    `reasoning_gym:TASK:...`. About a third of the tasks compare text, in this process. The scorers of others
    may raise exceptions, take forever (`9**9**9**9`) or execute what they read, so they run in processes that
    are killed at a limit of time or memory, see `grading.gym_scores`. Whatever cannot be scored earns 0.

    Attributes:
      answer_format: `tag` reads the last `<answer>...</answer>`, as the package does; `boxed` the last
        `\boxed{...}`; `last_line` the last line that is not blank.
      instruction: appended to the problem as a separate paragraph; None asks for the format.
      timeout: seconds for one answer.
      workers: processes.
      memory_mib: MiB of address space for one answer.

    Raises:
      ValueError: for an unknown answer_format, and limits that are not positive.
    """

    answer_format: str = "tag"
    instruction: str | None = None
    timeout: float = 5.0
    workers: int = 2
    memory_mib: int = 1024
    _verdicts: CachedWorkers = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.answer_format not in INSTRUCTIONS:
            raise ValueError(
                f"answer_format={self.answer_format!r} is unknown; choose one of {', '.join(INSTRUCTIONS)}"
            )
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout={self.timeout!r}: give seconds, more than 0")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers!r}: give at least 1 process")
        if self.memory_mib < 512:
            raise ValueError(f"memory_mib={self.memory_mib!r}: reasoning-gym needs more; give at least 512")
        judge = "espl_jax.environments.grading.gym_scores"
        workers = Workers(self.workers, self.timeout, self.memory_mib, judge, slack=_PREPARATION)
        object.__setattr__(self, "_verdicts", CachedWorkers(workers))

    def user_message(self, problem: Problem) -> str:
        """Returns the problem's text, and the instruction after a blank line.

        Raises:
          ValueError: if the problem's id names no entry of reasoning-gym.
        """
        gym.parse_id(problem.id)
        instruction = INSTRUCTIONS[self.answer_format] if self.instruction is None else self.instruction
        return f"{problem.text}\n\n{instruction}".rstrip()

    def begin(self, problem: Problem, reply: str) -> None:
        """Starts to grade a reply, and does not wait. From any thread."""
        self._begin(problem, reply)

    def grade(self, problems: Sequence[Problem], replies: Sequence[str]) -> list[Grade]:
        """Grades of a batch, in order.

        Raises:
          ValueError: if a problem is no entry of reasoning-gym, or of another version of it.
          RuntimeError: if no process for grading can be started.
        """
        begun = [self._begin(problem, reply) for problem, reply in zip(problems, replies, strict=True)]
        return [self._finished(problem, each) for problem, each in zip(problems, begun, strict=True)]

    def close(self) -> None:
        """Ends the processes; they start again if another answer is graded."""
        self._verdicts.close()

    def extract(self, reply: str) -> str | None:
        """Returns the answer in a reply, stripped; None if the reply has none."""
        if self.answer_format == "boxed":
            return boxed.last_boxed(reply)
        if self.answer_format == "tag":
            return last_tagged(reply)
        return reply.strip().rpartition("\n")[2].strip() or None

    def _begin(self, problem: Problem, reply: str) -> Grade | tuple[str, Future[Verdict]]:
        """The grade where it is plain, else the answer and its verdict to come."""
        answer = self.extract(reply)
        if answer is None:
            return Grade(0.0, False, feedback=_MISSING[self.answer_format])
        where = _WHERE[self.answer_format]
        if not answer:
            return Grade(0.0, False, answer, feedback=f"There is nothing {where}.")
        if len(answer) > LONGEST_ANSWER:
            too_long = f"There are {len(answer)} characters {where}; only the final answer belongs there."
            return Grade(0.0, False, answer[:_SHOWN], feedback=too_long)
        task, index = gym.parse_id(problem.id)
        if answer == problem.answer:
            return Grade(1.0, True, answer[:_SHOWN])
        if (gym.entry(task, index)["question"] or "").strip() != problem.text:
            raise ValueError(
                f"problem {problem.id!r}: the installed version of reasoning-gym generates another question; "
                "install the version that generated the problem"
            )
        if gym.compares_text(task):
            return self._scored(problem, answer, gym.score(task, index, answer))
        return answer, self._verdicts.submit("score", problem.id, answer)

    def _finished(self, problem: Problem, begun: Grade | tuple[str, Future[Verdict]]) -> Grade:
        if isinstance(begun, Grade):
            return begun
        answer, verdict = begun[0], begun[1].result()
        if verdict.outcome == "graded" and verdict.answer is not None:
            return self._scored(problem, answer, float(verdict.answer))
        if verdict.outcome == "timeout":
            why = f"The answer could not be evaluated within {self.timeout:g} seconds; simplify it."
        else:
            why = "The answer could not be read; write it in the form that the task asks for."
        return Grade(0.0, False, answer[:_SHOWN], feedback=why)

    def _scored(self, problem: Problem, answer: str, score: float) -> Grade:
        if score >= 1:
            return Grade(score, True, answer[:_SHOWN])
        task, index = gym.parse_id(problem.id)
        if task.name in FEEDBACK and (known := FEEDBACK[task.name](answer, gym.entry(task, index))):
            feedback = known
        elif score >= LITTLE:
            # The answer is not repeated: a partial score often means that it contains the right one.
            feedback = (
                f"The answer earned {score:.2g} of 1. It is partly right, or not in the form that the task "
                f"asks for; only the final answer belongs {_WHERE[self.answer_format]}."
            )
        else:
            feedback = f"The answer that was read, {answer[:_SHOWN]}, is wrong."
        return Grade(score, False, answer[:_SHOWN], feedback=feedback)


def last_tagged(text: str) -> str | None:
    """Returns the content of the last `<answer>...</answer>`, stripped; None without one.

    It is that of `reasoning_gym.utils.extract_answer`, whose regular expression takes quadratic time.
    """
    content, place = None, 0
    while (start := text.find("<answer>", place)) >= 0:
        start += len("<answer>")
        end = text.find("</answer>", start)
        if end < 0:
            break
        content, place = text[start:end], end + len("</answer>")
    return None if content is None else content.strip()
