"""Tools in conversations: how a chat template shows them, and how a call is answered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from espl_jax.text.chat import render
from espl_jax.types import Conversation, Message

Tool = Mapping[str, Any]
"""A function's schema as OpenAI writes it: `{"type": "function", "function": {"name", ...}}`."""

_MARK = "the-end-of-what-the-model-said"


def with_tools(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, tools: Sequence[Tool], **kwargs: Any
) -> tuple[Conversation, dict[str, Any]]:
    """A conversation that tells of tools, and the arguments with which to render it.

    Where the chat template writes tools, it is given them; else they are described at the end of the system
    turn, which there is in any case, and the model is asked to call them as Hermes and Qwen do.

    Args:
      tokenizer: with a chat template.
      messages: with or without a system turn.
      tools: may be empty; then nothing changes.
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
    """Whether the chat template shows tools: found out by showing it some."""
    trial = [{"role": "user", "content": "a"}]
    try:
        text = render(tokenizer, trial, **kwargs | _arguments(tools))
    except (TemplateError, ValueError):
        return False
    return all(tool["function"]["name"] in text for tool in tools)


def _arguments(tools: Sequence[Tool]) -> dict[str, Any]:
    # Llama's templates would put them into the first user turn, where they could not be shared by problems.
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
    **kwargs: Any,
) -> str:
    """The text that stands between a turn that the model has ended and the one that it begins next.

    Args:
      tokenizer: with a chat template.
      messages: what is said to the model, of role `tool` or `user`. Templates that do not write tools get
        the results of tools in a user turn.
      tools: as for `with_tools`.
      ended_by: the text of the token with which the model ended its turn, which the template would write
        too; empty where something else ended it.
      **kwargs: passed to the template.

    Raises:
      ValueError: if the template refuses such a conversation.
    """
    spoken = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    told = {}
    if tools and writes_tools(tokenizer, tools, **kwargs):
        told = _arguments(tools)
    attempts = [_as_user_turn(messages)]
    if told:
        attempts.insert(0, [{"role": each["role"], "content": each["content"]} for each in messages])
    for i, attempt in enumerate(attempts):
        try:
            text = render(tokenizer, [*spoken, *attempt], **kwargs | told)
            break
        except (TemplateError, ValueError):
            if i == len(attempts) - 1:
                raise
    rest = text.rpartition(_MARK)[2]
    if ended_by and rest.lstrip().startswith(ended_by):
        rest = rest.lstrip()[len(ended_by) :]
    return rest


def _as_user_turn(messages: Sequence[Message]) -> Conversation:
    """One user turn that says everything, since many templates refuse two in a row."""
    parts = [
        f"<tool_response>\n{each['content']}\n</tool_response>" if each["role"] == "tool" else each["content"]
        for each in messages
    ]
    return [{"role": "user", "content": "\n".join(parts)}]
