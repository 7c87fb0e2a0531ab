"""What an environment is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from espl_jax.types import Grade, Problem


class Environment(Protocol):
    """A task: the user states a problem, the model replies, the reply is graded.

    Anything with these two methods serves. Both are pure: the same arguments always give the same result.

    A task of several turns has a third one, `respond(problem, text)`. It is called when the model's turn has
    ended by itself, with the text of the whole reply so far. It returns the text to append, exactly as the
    model is to read it (with the template's own words around it, if it needs them), or None at the end; or a
    `concurrent.futures.Future` of either, while other rollouts go on. What it says carries no gradient.
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
