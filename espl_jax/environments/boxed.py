r"""Answers given as `\boxed{...}`."""

from __future__ import annotations

import re

INSTRUCTION = r"Put the final answer in \boxed{}."
"""What a task that reads boxes asks for."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the last box whose braces balance, stripped; None without such a box or content.

    `\boxed` and `\fbox` count. Escaped braces (`\{`, `\}`) are not counted. Where boxes lie in
    each other, the outer one is the answer.
    """
    answer, end = None, 0
    closings = _closings(text)
    for box in _BOX.finditer(text):
        if box.start() >= end and box.end() - 1 in closings:
            end = closings[box.end() - 1]
            answer = text[box.end() : end].strip()
    return answer or None


def _closings(text: str) -> dict[int, int]:
    """Index of each balanced `{` -> index of its `}`."""
    closings: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            opened.append(brace.start())
        elif brace.group() == "}" and opened:
            closings[opened.pop()] = brace.start()
    return closings
