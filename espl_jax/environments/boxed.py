r"""Answers given as `\boxed{...}`."""

from __future__ import annotations

import re

INSTRUCTION = r"Put the final answer in \boxed{}."
"""What a task that reads boxes asks for."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
# A number (of which TeX boxes the first digit alone), a letter at the end of a formula, or a command.
_UNBRACED = re.compile(r"-?\d+(?:\.\d+)?|[a-zA-Z](?=\s*(?:[$.,;]|\\[)\]]|$))|\\[a-zA-Z]+")
# What stands for an answer where a box is only spoken of.
_PLACEHOLDER = re.compile(r"(?:\s|\\[,;:! ]|[.~…?]|\\(?:[lc]?dots|quad|square)(?![a-zA-Z]))*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the last box whose braces balance and hold an answer, stripped; None if there is none.

    `\boxed` and `\fbox` count, also around one number, letter or command without braces (`\boxed5`). Boxes
    that are empty or hold a placeholder (`\boxed{...}`) are passed over: they are spoken of, not filled.
    Escaped braces (`\{`, `\}`) are not counted. Where boxes lie in each other, the outer one is the answer.
    """
    answer, end = None, 0
    closings = _closings(text)
    for box in _BOX.finditer(text):
        if box.start() < end:
            continue
        start = box.end()
        if start in closings:
            content, end = text[start + 1 : closings[start]], closings[start]
        elif unbraced := _UNBRACED.match(text, start):
            end = unbraced.end()
            while unbraced.group().startswith("\\") and end in closings:
                end = closings[end] + 1
            content = text[start:end]
        else:
            continue
        if not _PLACEHOLDER.fullmatch(content):
            answer = content.strip()
    return answer


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
