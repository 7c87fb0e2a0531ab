"""What an environment is."""

from __future__ import annotations

import concurrent.futures
import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from espl_jax.storage import json_values
from espl_jax.types import Conversation, Grade, Message, Problem

if TYPE_CHECKING:
    from typing_extensions import TypeIs

ANSWERING_ROLES = ("tool", "user")
"""Roles of what a dialogue says to the model."""

_LARGEST = float(np.finfo(np.float32).max)


class Environment(Protocol):
    """A task of one turn: the user states a problem, the model replies, the reply is graded.

    Anything with these two methods serves. Both are pure: the same arguments always give the same result.

    One whose grading takes time may be a `GradesEarly`, too.
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

    @property
    def tools(self) -> Sequence[dict[str, Any]]: ...

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


class GradesEarly(Protocol):
    """An environment that can begin to grade a reply while other rollouts are still sampled."""

    def begin(self, problem: Problem, reply: Any) -> None:
        """Is told of a rollout that is done. Returns at once, and changes nothing of what `grade` says."""
        ...


def is_dialogue(environment: Any) -> TypeIs[Dialogue]:
    """Whether an environment has several turns: whether it has a method `respond`."""
    return callable(getattr(environment, "respond", None))


def grades_early(environment: Any) -> TypeIs[GradesEarly]:
    """Whether an environment has a method `begin`."""
    return callable(getattr(environment, "begin", None))


def name_of(environment: Environment | Dialogue) -> str:
    """`module:Class`, to call an environment by in errors."""
    return f"{type(environment).__module__}:{type(environment).__qualname__}"


def checked_user_message(environment: Environment | Dialogue, problem: Problem) -> str:
    """What the environment words for a problem. Raises ValueError unless it is text in whole characters."""
    message = environment.user_message(problem)
    if not isinstance(message, str):
        raise ValueError(
            f"{name_of(environment)}.user_message returned {reprlib.repr(message)} for problem "
            f"{problem.id!r}; it must return text"
        )
    where = f"{name_of(environment)}.user_message: the text for problem {problem.id!r}"
    json_values.check_characters(message, where)
    return message


def checked_tools(environment: Environment | Dialogue) -> Sequence[Mapping[str, Any]]:
    """The environment's tools, empty if it has none.

    Raises:
      ValueError: naming environment and tool, unless all are schemas of functions, see `Dialogue`.
    """
    tools = getattr(environment, "tools", None)
    if tools is None:
        return ()
    listed = isinstance(tools, list | tuple)
    wrong = [tool for tool in tools if not _is_tool(tool)] if listed else [tools]
    if wrong:
        raise ValueError(
            f"{name_of(environment)}.tools has {reprlib.repr(wrong[0])}; it must be a list of schemas in "
            'JSON, {"type": "function", "function": {"name": text, ...}}'
        )
    return tools


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    try:
        json.dumps(tool, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):  # ValueError: half of a surrogate pair, or a loop
        return False
    return isinstance(name, str) and bool(name)


def checked_messages(environment: Dialogue, problem: Problem, messages: Any) -> tuple[Message, ...]:
    """What the environment responded, empty at the end.

    Raises:
      ValueError: naming environment and problem, unless it is None or messages as `Dialogue.respond` says.
    """
    if messages is None:
        return ()
    listed = isinstance(messages, list | tuple)
    wrong = [each for each in messages if not _is_answering(each)] if listed else [messages]
    if wrong:
        raise ValueError(
            f"{name_of(environment)}.respond returned {reprlib.repr(wrong[0])} for problem {problem.id!r}; "
            'it must return None, or a list of messages, {"role": "user" or "tool", "content": text}'
        )
    for message in messages:
        where = f"{name_of(environment)}.respond: a message for problem {problem.id!r}"
        json_values.check_characters(message["content"], where)
    return tuple(messages)


def _is_answering(message: Any) -> bool:
    return (
        isinstance(message, Mapping)
        and message.get("role") in ANSWERING_ROLES
        and isinstance(message.get("content"), str)
    )


def checked_grades(
    environment: Environment | Dialogue, problems: Sequence[Problem], replies: Sequence[Any]
) -> list[Grade]:
    """The environment's grades of a batch.

    Raises:
      ValueError: naming environment and problem, unless there is one Grade for each reply, its reward and
        metrics finite numbers, its success True or False, its answer text in whole characters or None.
    """
    name = f"{name_of(environment)}.grade"
    grades = environment.grade(problems, replies)
    if not isinstance(grades, list | tuple) or len(grades) != len(replies):
        count = f"{len(grades)} grades" if isinstance(grades, list | tuple) else reprlib.repr(grades)
        raise ValueError(
            f"{name} returned {count} for {len(replies)} replies to problems {problems[0].id!r} to "
            f"{problems[-1].id!r}; it must return a list with one Grade for each reply, in order"
        )
    for problem, grade in zip(problems, grades, strict=True):
        if wrong := _wrong_in(grade):
            raise ValueError(f"{name} returned {wrong} for problem {problem.id!r}")
        for text in (grade.answer or "", grade.feedback, *grade.metrics):
            json_values.check_characters(
                text, f"{name}: the answer, the feedback or a metric for problem {problem.id!r}"
            )
    return list(grades)


def _wrong_in(grade: Any) -> str:
    """What of a grade is not as `Grade` says, and how it must be; empty if all is well."""
    if not isinstance(grade, Grade):
        return f"{reprlib.repr(grade)} and not a Grade (espl_jax.types.Grade(reward, success, answer))"
    if not is_finite(grade.reward):
        return f"the reward {reprlib.repr(grade.reward)}, which must be a finite number,"
    if not isinstance(grade.success, bool | np.bool_):
        return f"the success {reprlib.repr(grade.success)}, which must be True or False,"
    if not isinstance(grade.answer, str | None):
        return f"the answer {reprlib.repr(grade.answer)}, which must be text or None,"
    if not isinstance(grade.feedback, str):
        return f"the feedback {reprlib.repr(grade.feedback)}, which must be text,"
    if not isinstance(grade.metrics, Mapping):
        return f"the metrics {reprlib.repr(grade.metrics)}, which must be a dict from names to numbers,"
    for name, value in grade.metrics.items():
        if not isinstance(name, str) or not is_finite(value):
            return f"the metric {name!r}: {reprlib.repr(value)}, which must be a name and a finite number,"
    return ""


def is_finite(value: Any) -> bool:
    """Whether a value is a number that float32 can hold; text is none."""
    try:
        return not isinstance(value, str | bytes) and abs(float(value)) <= _LARGEST
    except (TypeError, ValueError, OverflowError):
        return False
