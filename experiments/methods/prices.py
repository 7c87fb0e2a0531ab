"""Facts and steps: prices that only the feedback tells, and products that the model has to work out.

    What do 8 cups cost?

No text says what a cup costs until a reply is wrong; then the feedback does ("A cup costs 9 coins."). A
prompt can hold the prices, and the weights can learn them from rewards. Multiplying takes practice. Run as a
module, this writes the problems beside it:

    python -m experiments.methods.prices
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from espl_jax.environments.arithmetic import Arithmetic
from espl_jax.types import Grade, Problem

PRICES = {"pear": 7, "cup": 9, "rope": 4}
"""Item -> coins."""

WORDINGS = ("What do {} {}s cost?", "How much do {} {}s cost?", "What is the price of {} {}s?")

SPLITS = {"train": (2, 3, 5, 6, 8, 9, 11, 12), "test": (4, 7, 10), "hard": range(13, 25)}
"""Split -> how many of an item are bought. No number is in two splits."""

FOLDER = Path(__file__).parent


def said(item: str) -> str:
    """What the feedback says of an item."""
    return f"A {item} costs {PRICES[item]} coins."


ALL_SAID = " ".join(map(said, PRICES))


class Prices:
    """Grades the last number of a reply, and says the price of the item if it is wrong."""

    def __init__(self) -> None:
        """Takes no options."""
        self._numbers = Arithmetic()

    def user_message(self, problem: Problem) -> str:
        """The problem's text."""
        return problem.text

    def grade(self, problems: Sequence[Problem], replies: Sequence[str]) -> list[Grade]:
        """Grades of a batch, in order: reward 1 for the right number, else 0."""
        grades = self._numbers.grade(problems, replies)
        return [
            grade if grade.success else Grade(0.0, False, grade.answer, feedback=said(item_of(problem)))
            for problem, grade in zip(problems, grades, strict=True)
        ]


def item_of(problem: Problem) -> str:
    """The item that a problem asks about."""
    return problem.id.split("-")[1]


def problems(split: str) -> Iterator[dict[str, str]]:
    """The problems of a split, as records of a JSONL file."""
    for number in SPLITS[split]:
        for item, price in PRICES.items():
            for wording, text in enumerate(WORDINGS):
                yield {
                    "id": f"{number}-{item}-{wording}",
                    "problem": text.format(number, item),
                    "answer": str(number * price),
                }


def main() -> None:
    """Writes a file for each split."""
    for split in SPLITS:
        lines = [json.dumps(record) + "\n" for record in problems(split)]
        (FOLDER / f"prices-{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
