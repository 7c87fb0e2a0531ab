"""Text of what a model wrote, from its tokens, and how a prompt makes it reply at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from espl_jax.text import harmony
from espl_jax.text.thinking import CLOSE, prompt_opens_thinking

NO_THOUGHTS = f"\n{CLOSE}\n\n"
"""What follows an opening tag where nothing is to be thought."""


def decode_reply(tokenizer: Any, tokens: Sequence[int] | np.ndarray, opened: bool = False) -> str:
    """Returns what a model wrote, without special tokens, with its thinking in `<think>` tags.

    Args:
      tokenizer: the model's. If its chat template writes channels (`text.harmony`), the channel analysis is
        thinking, and calls of tools are in `<tool_call>` tags.
      tokens: what the model wrote.
      opened: whether the prompt ended inside a thinking block.
    """
    if not harmony.is_format_of(tokenizer):
        return cast(str, tokenizer.decode(tokens, skip_special_tokens=True))
    return harmony.with_tags(_with_markers(tokenizer, tokens), opened)


def decode_calls(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> str:
    """Returns what a model wrote, with the special tokens that some formats use to mark calls of tools."""
    if harmony.is_format_of(tokenizer):
        return _with_markers(tokenizer, tokens)
    return cast(str, tokenizer.decode(tokens))


def _with_markers(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> str:
    markers = set(tokenizer.convert_tokens_to_ids(sorted(harmony.MARKERS)))
    others = set(tokenizer.all_special_ids) - markers
    others |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i not in markers}
    return cast(str, tokenizer.decode([int(token) for token in tokens if int(token) not in others]))


def replies_at_once(tokenizer: Any, prompt: str) -> str:
    """Returns what is appended to a prompt so that the model writes nothing before its reply; may be empty.

    Args:
      tokenizer: the model's.
      prompt: a rendered conversation.
    """
    if harmony.is_format_of(tokenizer):
        return "" if prompt.endswith(harmony.FINAL) else harmony.FINAL
    return NO_THOUGHTS if prompt_opens_thinking(prompt) else ""


def closes_thinking(tokenizer: Any) -> str:
    """Returns what a model writes to end its thinking."""
    return harmony.END if harmony.is_format_of(tokenizer) else CLOSE


def after_thinking(tokenizer: Any) -> str:
    """Returns what a model writes between the end of its thinking and its reply."""
    return f"{harmony.START}assistant{harmony.FINAL}" if harmony.is_format_of(tokenizer) else "\n\n"
