"""Removes control tokens from texts, so that they cannot end or begin a turn in a chat template."""

from __future__ import annotations

import functools
import re
from typing import TypeVar, cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from espl_jax.text.chat_template import TRIAL_TOOL, apply_chat_template, named_templates
from espl_jax.text.thinking import CLOSE, OPEN

WITHIN_TURNS = frozenset({OPEN, CLOSE, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"})
"""Tags that structure a turn; not removed, since prompts explain them and openings contain them."""

_Value = TypeVar("_Value")


def without_control_tokens(tokenizer: PreTrainedTokenizerBase, value: _Value) -> _Value:
    """Replaces every control token in a text by a space.

    Control tokens are the tokenizer's special tokens, and other added tokens in angle or square brackets that
    its chat template writes around turns (DeepSeek's `<｜User｜>`), except those in `WITHIN_TURNS`.

    Args:
      tokenizer: tokenizer of the model that reads the text.
      value: a text, or messages or tools, in which all texts are changed.

    Returns:
      The value without control tokens.
    """
    templates = tuple(named_templates(tokenizer).items())
    return _replaced(_control_tokens(tokenizer, len(tokenizer), templates), value)


def _replaced(control_tokens: re.Pattern[str], value: _Value) -> _Value:
    match value:
        case str():
            found = 1
            while found:  # removing a token may create another
                value, found = control_tokens.subn(" ", value)
        case list() | tuple():
            return type(value)(_replaced(control_tokens, item) for item in value)
        case dict():
            replaced = {name: _replaced(control_tokens, item) for name, item in value.items()}
            return cast(_Value, replaced)
    return value


@functools.lru_cache(maxsize=8)
def _control_tokens(
    tokenizer: PreTrainedTokenizerBase, size: int, templates: tuple[tuple[str, str], ...]
) -> re.Pattern[str]:
    """Returns a pattern of control tokens, longest first. `size` and `templates` are only cache keys."""
    added = tokenizer.added_tokens_decoder
    names = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
    names |= {
        added[i].content
        for text in _trials(tokenizer)
        for i in tokenizer.encode(text, add_special_tokens=False)
        if i in added and re.fullmatch(r"<.+>|\[.+\]", added[i].content, re.DOTALL)
    }
    longest_first = sorted((name for name in names - WITHIN_TURNS if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _trials(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Renders simple conversations with all roles, skipping those that the chat template rejects."""
    system, user, assistant, tool = (
        {"role": role, "content": "a"} for role in ("system", "user", "assistant", "tool")
    )
    written = []
    for tools in ({}, {"tools": [TRIAL_TOOL]}):
        for turns in ([system, user, assistant, user], [user, assistant, user], [user, assistant, tool]):
            try:
                written.append(apply_chat_template(tokenizer, turns, **tools))
            except (TemplateError, TypeError, ValueError):
                continue
    return written
