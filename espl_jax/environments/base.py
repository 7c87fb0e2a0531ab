"""What an environment is."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from typing import Any, Protocol

from espl_jax.types import Conversation, Grade, Message, Problem


class Environment(Protocol):
    """A task of one turn: the user states a problem, the model replies, the reply is graded.

    Anything with these two methods serves. Both are pure: the same arguments always give the same result.

    An environment whose grading takes time may have a third one, `begin(problem, reply)`. It is called when a
    rollout is done while others are still sampled, returns at once, and changes nothing of what `grade` says.
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


class Dialogue(Protocol):
    """A task of several turns: between the model's turns something is said to it, such as a tool's result.

    An environment that has a method `respond` is one of these. Its transcripts are the messages after the
    first user turn, beginning and ending with one of the assistant's. A message of the assistant's has the
    `content` that the model wrote, without its thinking, and where that has calls of tools in the model's own
    format, a list `tool_calls`: each is `{"name": str, "arguments": dict}`, or, if it cannot be read,
    `{"error": str}`, which says why.

    Attributes:
      tools: schemas of the tools, as OpenAI writes them (`{"type": "function", "function": {"name", ...}}`);
        may be empty. They are shown in the system turn as the model's chat template does, or as
        `text.tools` does where the template knows no tools.
    """

    tools: Sequence[dict[str, Any]]

    def user_message(self, problem: Problem) -> str:
        """The content of the first user turn."""
        ...

    def respond(
        self, problem: Problem, transcript: Conversation
    ) -> Sequence[Message] | concurrent.futures.Future | None:
        """What is said to the model after a turn that it has ended by itself.

        Messages of role `tool` or `user` (templates that know no tools give a tool's message in a user turn),
        or nothing at the end; or a future of either, while other rollouts go on. What they say carries no
        gradient.
        """
        ...

    def grade(self, problems: Sequence[Problem], transcripts: Sequence[Conversation]) -> list[Grade]:
        """Grades of a batch, in order; whatever the model wrote is graded."""
        ...
