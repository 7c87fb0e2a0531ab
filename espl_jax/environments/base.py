"""What an environment is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from espl_jax.types import Grade, Problem


class Environment(Protocol):
    """A single-turn task: the user states a problem, the model replies once, the reply is graded.

    Anything with these two methods serves. Both are pure: the same arguments always give the same result.
    """

    def user_message(self, problem: Problem) -> str:
        """The content of the user turn."""
        ...

    def grade(self, problems: Sequence[Problem], replies: Sequence[str]) -> list[Grade]:
        """Grades of a batch, in order.

        Args:
          problems: one for each reply.
          replies: what the model wrote, without its thinking.

        A reply of any kind is graded, never refused: no answer in it means reward 0.
        """
        ...
