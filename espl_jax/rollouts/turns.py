"""Multi-turn rollouts: translates between an environment's messages and the sampler's tokens."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from espl_jax.environments.base import Dialogue, checked_messages, checked_tools
from espl_jax.sampling.answers import Place
from espl_jax.text.chat import encode
from espl_jax.text.chat_format import ChatFormat
from espl_jax.text.replies import decode_calls, decode_reply
from espl_jax.text.thinking import prompt_opens_thinking, strip_thinking
from espl_jax.text.tool_calls import Call, calls_in, tool_format_of
from espl_jax.text.tools import between_turns
from espl_jax.types import Conversation, Message, Problem


@dataclasses.dataclass(frozen=True)
class _Said:
    """An answer that was appended to a row after a turn.

    Attributes:
      messages: the environment's messages.
      start, end: range of their tokens in the row.
      opened: whether they end inside a thinking block.
    """

    messages: tuple[Message, ...]
    start: int
    end: int
    opened: bool


class Turns:
    """The conversations of one batch. With several processes, only the first one uses it."""

    def __init__(
        self,
        environment: Dialogue,
        problems: Sequence[Problem],
        tokenizer: Any,
        chat: ChatFormat,
        *,
        stop_ids: Sequence[int],
        opened: bool,
    ):
        """Starts empty conversations.

        Args:
          environment: answers each turn.
          problems: B problems.
          tokenizer: the model's, with a chat template.
          chat: chat template arguments, and the handling of thinking and tool calls; the caller handles
            `stop_strings`.
          stop_ids: tokens that end a turn.
          opened: whether prompts end inside a thinking block.
        """
        self._environment = environment
        self._tools = checked_tools(environment)
        self._problems = problems
        self._tokenizer = tokenizer
        self._tool_format = tool_format_of(tokenizer) if chat.tool_format == "auto" else chat.tool_format
        self._stop_ids = frozenset(stop_ids)
        self._opened = opened
        self._show_thinking = chat.show_thinking
        self._kwargs = dict(chat.template_arguments)
        self._said: dict[Place, list[_Said]] = {}

    def respond(self, place: Place, tokens: np.ndarray) -> Any:
        """Returns the environment's answer as tokens; a `sampling.answers.Respond`."""
        problem = self._problems[place[1]]
        transcript = self.transcript(place, tokens)
        calls = transcript[-1].get("tool_calls", ())
        answer = self._environment.respond(problem, transcript)

        def in_tokens(messages: Any) -> list[int] | None:
            checked = checked_messages(self._environment, problem, messages)
            return self._append(place, tokens, checked, calls) if checked else None

        if isinstance(answer, concurrent.futures.Future):
            return _mapped(answer, in_tokens)
        return in_tokens(answer)

    def transcript(self, place: Place, tokens: np.ndarray) -> Conversation:
        """Returns the messages of a row so far, in the format of `Dialogue`.

        Args:
          place: (m, b, n) of the row.
          tokens: int32 [length], all tokens after its prompt.
        """
        messages, start, opened = [], 0, self._opened
        for said in self._said.get(place, ()):
            if said.end > len(tokens):
                break  # the answer exceeded the row's limit and was not appended
            messages += [self._own_turn(tokens[start : said.start], opened), *said.messages]
            start, opened = said.end, said.opened
        return [*messages, self._own_turn(tokens[start:], opened)]

    def _append(
        self, place: Place, tokens: np.ndarray, messages: Sequence[Message], calls: Sequence[Call]
    ) -> list[int]:
        ended_by = self._tokenizer.decode(tokens[-1:]) if tokens[-1] in self._stop_ids else ""
        text = between_turns(self._tokenizer, messages, self._tools, ended_by, calls, **self._kwargs)
        appended = encode(self._tokenizer, text)
        said = _Said(tuple(messages), len(tokens), len(tokens) + len(appended), prompt_opens_thinking(text))
        self._said.setdefault(place, []).append(said)
        return appended

    def _own_turn(self, tokens: np.ndarray, opened: bool) -> Message:
        text = decode_reply(self._tokenizer, tokens, opened)
        visible = text if self._show_thinking else strip_thinking(text, opened)
        message: Message = {"role": "assistant", "content": visible}
        if self._tools:
            calls = self._calls(tokens, opened)
            if calls:
                message["tool_calls"] = calls
        return message

    def _calls(self, tokens: np.ndarray, opened: bool) -> list[Call]:
        kept = tokens[:-1] if len(tokens) and tokens[-1] in self._stop_ids else tokens
        text = decode_calls(self._tokenizer, kept)
        if self._tool_format != "harmony":  # there, channels tell thinking and calls apart
            text = strip_thinking(text, opened)
        return calls_in(text, self._tool_format)


def as_text(transcript: Conversation) -> str:
    """Formats a transcript for reading. Messages not from the model are headed by their role in brackets."""
    return "\n\n".join(
        each["content"] if each["role"] == "assistant" else f"[{each['role']}]\n{each['content']}"
        for each in transcript
    )


def _mapped(future: concurrent.futures.Future, function: Callable[[Any], Any]) -> concurrent.futures.Future:
    """Returns a future of `function` applied to another future's result."""
    mapped: concurrent.futures.Future = concurrent.futures.Future()

    def done(original: concurrent.futures.Future) -> None:
        try:
            mapped.set_result(function(original.result()))
        except BaseException as error:
            mapped.set_exception(error)

    future.add_done_callback(done)
    return mapped
