"""Thinking blocks in prompts and replies."""

from __future__ import annotations

import re

OPEN, CLOSE = "<think>", "</think>"
_BLOCK = re.compile(f"{OPEN}.*?{CLOSE}", re.DOTALL)


def prompt_opens_thinking(prompt: str) -> bool:
    """Returns whether a rendered prompt ends inside a thinking block, so that the reply begins in it."""
    return prompt.rstrip().endswith((OPEN, "<|channel|>analysis<|message|>"))  # the latter: `text.harmony`


def strip_thinking(text: str, opened: bool = False) -> str:
    """Removes thinking from a text, for grader and reflector.

    Removes `<think>...</think>` blocks; everything up to a `</think>` without an opening tag (the template
    wrote it into the prompt); and everything after a `<think>` that is never closed. A text without either
    tag is returned unchanged; otherwise surrounding whitespace is stripped.

    Args:
      text: text of the model.
      opened: whether the prompt ended inside a thinking block.
    """
    text = OPEN + text if opened else text
    if OPEN not in text and CLOSE not in text:
        return text
    # Searching only up to the last closing tag keeps this linear, even with many unclosed tags.
    thought, close, rest = text.rpartition(CLOSE)
    kept = _BLOCK.sub("", thought + close).rpartition(CLOSE)[2]
    return (kept + rest.partition(OPEN)[0]).strip()


def strip_tags(text: str) -> str:
    """What was thought, without the tags around it."""
    return text.replace(OPEN, "").replace(CLOSE, "").strip()
