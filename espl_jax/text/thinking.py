"""What a model says after it has thought."""

from __future__ import annotations

import re

OPEN, CLOSE = "<think>", "</think>"
_BLOCK = re.compile(f"{OPEN}.*?{CLOSE}", re.DOTALL)


def prompt_opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thinking block, which the reply then begins in."""
    return prompt.rstrip().endswith(OPEN)


def strip_thinking(text: str, opened: bool = False) -> str:
    """The text without its thinking: what graders and reflection are given.

    Left out are `<think>...</think>` blocks; everything up to a `</think>` that nothing opened (the template
    wrote the opening tag into the prompt); and everything after a `<think>` that is never closed. Text
    without either tag is returned as it stands, otherwise the white space around the rest is trimmed.

    Args:
      text: what the model wrote.
      opened: the prompt ended inside a thinking block.
    """
    text = OPEN + text if opened else text
    if OPEN not in text and CLOSE not in text:
        return text
    # Searching only up to the last closing tag keeps the search linear, however many tags are left open.
    thought, close, rest = text.rpartition(CLOSE)
    kept = _BLOCK.sub("", thought + close).rpartition(CLOSE)[2]
    return (kept + rest.partition(OPEN)[0]).strip()


def strip_tags(text: str) -> str:
    """What was thought, without the tags around it."""
    return text.replace(OPEN, "").replace(CLOSE, "").strip()
