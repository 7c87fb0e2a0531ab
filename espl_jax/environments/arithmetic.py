"""Sums with one number as the answer: small enough for a small model to learn in minutes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from decimal import Decimal

from espl_jax.environments import boxed
from espl_jax.types import Grade, Problem

ANSWER_FORMATS = ("last_number", "boxed")

# Digits in groups of three with commas, or without; then decimals. ASCII digits only.
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+", re.ASCII)
_MINUS = "-\N{MINUS SIGN}"
# What may stand between a number and its unit.
_BEFORE_UNIT = r"(?:\s|~|\\[,;:! )\]]|[}$*]|\\(?:text|mathrm|textrm)\s*\{)*"


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    r"""Grades a number: reward 1 for the right one, 0.5 for the right one without its unit, else 0.

    Attributes:
      answer_format: `last_number` reads the last number of the reply ("27 + 58 = 85" is 85), `boxed` the last
        number inside the last `\boxed{...}`.
      instruction: said after the problem; None asks for a box where one is needed, and says nothing else.
      unit: has to follow the number, as in `\boxed{85 points}`, `\boxed{85\text{ points}}` or
        `\boxed{85} points`; empty for a bare number.

    Raises:
      ValueError: for an unknown answer_format, or a unit that is not a word.
    """

    answer_format: str = "last_number"
    instruction: str | None = None
    unit: str = ""

    def __post_init__(self):
        if self.answer_format not in ANSWER_FORMATS:
            raise ValueError(
                f"answer_format={self.answer_format!r} is unknown; choose one of {', '.join(ANSWER_FORMATS)}"
            )
        if self.unit and not self.unit.isalpha():
            raise ValueError(f"unit={self.unit!r}: must be one word of letters, or empty")

    def user_message(self, problem: Problem) -> str:
        """The problem's text, and the instruction on the same line."""
        instruction = self.instruction
        if instruction is None:
            instruction = boxed.INSTRUCTION if self.answer_format == "boxed" else ""
        return f"{problem.text} {instruction}".rstrip()

    def grade(self, problems: Sequence[Problem], replies: Sequence[str]) -> list[Grade]:
        """Grades of a batch, in order.

        Raises:
          ValueError: if a gold answer is not a number.
        """
        return [self._grade(problem, reply) for problem, reply in zip(problems, replies, strict=True)]

    def _grade(self, problem: Problem, reply: str) -> Grade:
        golds = []
        for answer in (problem.answer, *problem.aliases):
            gold = last_number(answer)
            if gold is None:
                raise ValueError(f"problem {problem.id}: answer={answer!r} holds no number; correct the data")
            golds.append(Decimal(gold))
        is_boxed = self.answer_format == "boxed"
        text = boxed.last_boxed(reply) if is_boxed else reply
        unit = f'The number has to be followed by the word "{self.unit}".' if self.unit else ""
        if text is None:
            return Grade(0.0, False, feedback=f"{boxed.NO_BOX} {unit}".rstrip())
        # LaTeX writes a thousands separator as {,} to avoid the space after a comma.
        number = last_number(text.replace("{,}", ",") if is_boxed else text)
        if number is None:
            where = "box" if is_boxed else "reply"
            return Grade(0.0, False, feedback=f"There is no number in the {where}. The answer is one number.")
        right, has_unit = Decimal(number) in golds, self._has_unit(text, reply)
        feedback = [] if right else [f"The answer that was read, {number}, is wrong."]
        if not has_unit:
            feedback.append(f"The unit is missing. {unit}")
        reward = right * (1.0 if has_unit else 0.5)
        return Grade(reward, right and has_unit, number, feedback=" ".join(feedback))

    def _has_unit(self, text: str, reply: str) -> bool:
        """Whether the unit follows the last number of `text`, in the box or right behind it."""
        if not self.unit:
            return True
        number = re.escape(list(_NUMBER.finditer(text))[-1].group())
        followed = rf"(?<![\d.,]){number}{_BEFORE_UNIT}{self.unit}(?![^\W\d_])"
        return bool(re.search(followed, reply.replace("{,}", ","), re.IGNORECASE))


def last_number(text: str) -> str | None:
    """The last number of a text as plain digits, `-1234.5`; None without one.

    Commas between groups of three digits belong to the number. A minus before it is its sign unless something
    is there to subtract from: a digit or a closing bracket ("9 - 4"), or a word that it hyphenates.
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    before = text[: numbers[-1].start()]
    sign = ""
    if before.endswith(tuple(_MINUS)):
        left = before[:-1]
        subtracted = left.rstrip().endswith(tuple("0123456789)]}"))
        hyphenated = left[-1:].isalnum()
        sign = "" if subtracted or hyphenated else "-"
    return sign + numbers[-1].group().replace(",", "")
