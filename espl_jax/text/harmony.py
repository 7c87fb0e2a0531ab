"""The format of gpt-oss: every message of the model is in a channel (OpenAI's harmony response format, 2025).

A turn is a sequence of messages: `<|channel|>analysis<|message|>...<|end|>`, which is thinking, then
`<|start|>assistant<|channel|>final<|message|>...<|return|>`, the reply, or a call of a tool,
`<|start|>assistant<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from espl_jax.text.chat_template import named_templates
from espl_jax.text.thinking import CLOSE, OPEN, strip_tags

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END = "<|end|>"
ENDS = (END, "<|return|>", "<|call|>")
"""Tokens that end a message; the last two end a turn too."""

MARKERS = frozenset({START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS})

FINAL = f"{CHANNEL}final{MESSAGE}"
"""What begins the reply, where the model is to write nothing before it."""

ANALYSIS = f"{CHANNEL}analysis{MESSAGE}"
"""What begins thinking."""

_BETWEEN = re.compile("|".join(map(re.escape, (START, *ENDS))))
_CHANNEL = re.compile(rf"{re.escape(CHANNEL)}\s*([^\s<]+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


class Written(NamedTuple):
    """A message that the model wrote.

    Attributes:
      channel: `analysis`, `commentary` or `final`.
      recipient: name of the tool that it calls; empty for other messages.
      content: its text.
    """

    channel: str
    recipient: str
    content: str


def is_format_of(tokenizer: Any) -> bool:
    """Returns whether the chat template of a tokenizer writes channels."""
    return any(CHANNEL in template for template in named_templates(tokenizer).values())


def messages(text: str, opened: bool = False) -> Iterator[Written]:
    """Yields the messages of a turn.

    Args:
      text: what the model wrote, with special tokens.
      opened: whether the prompt ended inside a message of the channel analysis, which is then the first one
        even if nothing was added to it. Text that comes before all markers otherwise belongs to `final`.
    """
    for number, piece in enumerate(_BETWEEN.split(text)):
        header, mark, content = piece.partition(MESSAGE)
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if mark or (channel and recipient):  # without a mark, a call that has no arguments
            name = recipient[1].removeprefix("functions.") if recipient else ""
            yield Written(channel[1] if channel else "final", name, content)
        elif number == 0 and (piece or opened) and CHANNEL not in piece:
            yield Written("analysis" if opened else "final", "", piece)


def with_tags(text: str, opened: bool = False) -> str:
    """Returns a turn without markers: thinking and calls of tools are between the tags of other formats.

    Args:
      text, opened: as for `messages`. With `opened`, the first opening tag is missing, since the prompt has
        its equivalent.
    """
    parts = []
    for channel, recipient, content in messages(text, opened):
        if recipient:
            call = f'{{"name": "{recipient}", "arguments": {content.strip()}}}'
            parts.append(f"<tool_call>\n{call}\n</tool_call>")
        elif channel == "analysis":
            parts.append(f"{OPEN}{strip_tags(content)}{CLOSE}")
        else:
            parts.append(content)
    joined = "\n".join(parts)
    return joined.removeprefix(OPEN) if opened else joined


def opening(text: str) -> str:
    """Returns how a turn begins that has an opening in the format of other models.

    Args:
      text: thinking, which `<think>` opens, and after `</think>` the reply; or the reply alone, with or
        without an end of thinking before it.
    """
    thought, closed, reply = text.partition(CLOSE)
    if text.startswith(OPEN):
        thought = ANALYSIS + thought.removeprefix(OPEN).lstrip()
        return f"{thought.rstrip()}{END}{START}assistant{FINAL}{reply.lstrip()}" if closed else thought
    return FINAL + (text if thought.strip() else reply.lstrip())
