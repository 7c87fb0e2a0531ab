"""Word-level differences between prompts."""

from __future__ import annotations

import difflib
import re

from espl_jax.types import SystemPrompt

Part = tuple[str, str]
"""("=", text that both have), ("-", text of the old one alone) or ("+", text of the new one alone)."""


def word_diff(old: str, new: str) -> list[Part]:
    """Returns the parts that turn `old` into `new`, by words.

    The texts of the parts "=" and "-" joined are `old`, those of "=" and "+" are `new`.
    """
    before, after = _words(old), _words(new)
    parts: list[Part] = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, i, j, k, m in matcher.get_opcodes():
        if kind == "equal":
            parts.append(("=", "".join(before[i:j])))
            continue
        if i < j:
            parts.append(("-", "".join(before[i:j])))
        if k < m:
            parts.append(("+", "".join(after[k:m])))
    return parts


def prompt_diff(old: SystemPrompt, new: SystemPrompt) -> list[Part]:
    """Returns the difference between two prompts, without the numbers of principles, which shift."""
    return word_diff(_lines(old), _lines(new))


def _words(text: str) -> list[str]:
    """Splits a text into words with the blanks after them, and newlines."""
    return re.findall(r"\n|[^\S\n]+|\S+[^\S\n]*", text)


def _lines(prompt: SystemPrompt) -> str:
    return "\n".join(filter(None, (prompt.text, *prompt.principles)))
