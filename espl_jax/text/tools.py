"""Tools in conversations: their descriptions, and the turns with their results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from espl_jax.text import harmony
from espl_jax.text.chat import render
from espl_jax.types import Conversation, Message

Tool = Mapping[str, Any]
"""A function schema in OpenAI's format: `{"type": "function", "function": {"name", ...}}`."""

_MARK = "the-end-of-what-the-model-said"


def with_tools(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, tools: Sequence[Tool], **kwargs: Any
) -> tuple[Conversation, dict[str, Any]]:
    """Adds tools to a conversation, and returns it with the arguments for rendering it.

    If the chat template supports tools, they are passed to it. Otherwise they are described at the end of the
    system turn, which is added if missing, and the model is asked to use the call syntax of Hermes and Qwen.

    Args:
      tokenizer: a tokenizer with a chat template.
      messages: a conversation with or without a system turn.
      tools: the tools; if empty, nothing changes.
      **kwargs: passed to the template.
    """
    if not tools:
        return messages, kwargs
    if writes_tools(tokenizer, tools, **kwargs):
        return messages, kwargs | _arguments(tools)
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    told = "\n\n".join(part for part in (system, _described(tools)) if part.strip())
    return [{"role": "system", "content": told}, *rest], kwargs


def writes_tools(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool], **kwargs: Any) -> bool:
    """Returns whether the chat template writes tools. Tries it, by rendering a conversation with tools."""
    trial = [{"role": "user", "content": "a"}]
    try:
        text = render(tokenizer, trial, **kwargs | _arguments(tools))
    except (TemplateError, ValueError):
        return False
    return all(tool["function"]["name"] in text for tool in tools)


def _arguments(tools: Sequence[Tool]) -> dict[str, Any]:
    # By default Llama's templates put tools into the first user turn, which problems do not share.
    return {"tools": list(tools), "tools_in_user_message": False}


def _described(tools: Sequence[Tool]) -> str:
    schemas = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You can call these tools, each described by its JSON schema:\n{schemas}\n\n"
        "To call one, end your turn with its name and arguments as JSON between these tags:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
        "What it gives comes in the next turn, between <tool_response> and </tool_response>."
    )


def between_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    ended_by: str,
    calls: Sequence[Mapping[str, Any]] = (),
    **kwargs: Any,
) -> str:
    """Returns the text between the end of a turn of the model and the beginning of its next turn.

    Args:
      tokenizer: a tokenizer with a chat template.
      messages: messages to the model, with role `tool` or `user`. If the template does not support tools,
        tool results become a user turn.
      tools: as for `with_tools`.
      ended_by: text of the token with which the model ended its turn, which the template also writes; empty
        if the turn ended in another way.
      calls: the calls in the turn of the model (`text.tool_calls.Call`), for templates that write tool
        results only after them.
      **kwargs: passed to the template.

    Raises:
      ValueError: if the template rejects such a conversation.
    """
    spoken = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    told = {}
    if tools and writes_tools(tokenizer, tools, **kwargs):
        told = _arguments(tools)
    attempts = [[*spoken, *_as_user_turn(messages)]]
    if told:
        as_they_are = [{"role": each["role"], "content": each["content"]} for each in messages]
        attempts.insert(0, [*spoken, *as_they_are])
        if harmony.is_format_of(tokenizer) and any(each["role"] == "tool" for each in messages):
            name = next((call["name"] for call in calls if "name" in call), tools[0]["function"]["name"])
            attempts.insert(0, [spoken[0], _calling(name), *as_they_are])
    for i, attempt in enumerate(attempts):
        try:
            text = render(tokenizer, attempt, **kwargs | told)
            break
        except (TemplateError, ValueError):
            if i == len(attempts) - 1:
                raise
    rest = text.rpartition(_MARK)[2]
    if harmony.is_format_of(tokenizer):
        # The template ends the reply by another token than the model, and the mark may be inside JSON.
        end = re.search("|".join(map(re.escape, harmony.ENDS)), rest)
        return rest if end is None else rest[end.end() if ended_by in harmony.ENDS else end.start() :]
    if ended_by and rest.lstrip().startswith(ended_by):
        rest = rest.lstrip()[len(ended_by) :]
    return rest


def _calling(name: str) -> Message:
    """Returns a turn of the model that calls a tool, with the mark as its argument."""
    function = {"name": name, "arguments": {"a": _MARK}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _as_user_turn(messages: Sequence[Message]) -> Conversation:
    """Joins messages into one user turn, since many templates reject consecutive user turns."""
    parts = [
        f"<tool_response>\n{each['content']}\n</tool_response>" if each["role"] == "tool" else each["content"]
        for each in messages
    ]
    return [{"role": "user", "content": "\n".join(parts)}]
