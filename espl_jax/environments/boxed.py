r"""Answers given as `\boxed{...}`."""

from __future__ import annotations

import re

INSTRUCTION = r"Put the final answer in \boxed{}."
"""What a task that reads boxes asks for."""

NO_BOX = r"There is no answer in a box. The answer has to be written as \boxed{...}."
"""Feedback on a reply without an answer in a box."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
# Commands and how many arguments they take without braces, as in `\frac12`.
_ARGUMENTS = {r"\frac": 2, r"\dfrac": 2, r"\tfrac": 2, r"\cfrac": 2, r"\binom": 2, r"\dbinom": 2, r"\sqrt": 1}
_ROOT = re.compile(r"\s*\[[^\[\]{}]*\]")
# What ends a formula. Anything else after a box without braces may belong to the answer.
_CLOSER = r"(?:\$|\}|\\[)\]\\]|\\end(?![a-zA-Z])|\*\*(?=[.,;:]?(?:\s|\Z))|\n(?=\s*(?:\n|[A-Z]|\Z))|\Z)"
_END = re.compile(
    rf"(?:[^\S\n]|\\[,;:!])*(?:{_CLOSER}|\.(?=\s|{_CLOSER})|[,;:](?=[^\S\n]*{_CLOSER}|\s+[a-zA-Z]{{2}}))"
)
# What stands for an answer where a box is only spoken of.
_PLACEHOLDER = re.compile(r"(?:\s|\\[,;:! ]|[.~…?]|\\(?:[lc]?dots|quad|square)(?![a-zA-Z]))*")
# What may be an answer if no other box holds one.
_FILLER = (
    r"(?:[\s.~…?_{}$<>\[\]]|\\[,;:! _$]"
    r"|\\(?:[lc]?dots|cdot|q?quad|square|underline|(?:text|math)(?:rm|bf|it|tt|sf)?)(?![a-zA-Z]))"
)
_WEAK_PLACEHOLDER = re.compile(
    rf"{_FILLER}*(?:(?:(?:your|the|my|final|correct){_FILLER}+)*(?:answer|result)"
    rf"(?:{_FILLER}+(?:goes{_FILLER}+)?here)?{_FILLER}*)?",
    re.IGNORECASE,
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the last box whose braces balance and hold an answer, stripped; None if there is none.

    `\boxed` and `\fbox` count, also around one number, letter or command without braces (`\boxed5`,
    `\boxed\frac12`). If more of a formula follows such a box (`\boxed1/2`), its content is ambiguous, and
    there is no answer unless a later box holds one. Boxes that are empty or hold a placeholder
    (`\boxed{...}`) are passed over: they are spoken of, not filled. `\boxed{answer}`, `\boxed{\cdot}` and
    similar ones count as placeholders after a box with an answer. Escaped braces (`\{`, `\}`) are not
    counted. The outer one of nested boxes is the answer.
    """
    answer, end = None, 0
    closings = _closings(text)
    for box in _BOX.finditer(text):
        if box.start() < end:
            continue
        start = box.end()
        if start in closings:
            content, end = text[start + 1 : closings[start]], closings[start]
        else:
            unbraced = _unbraced(text, start, closings)
            if unbraced is None:
                continue
            end = unbraced
            if not _END.match(text, end):
                answer = None
                continue
            content = text[start:end]
        if not _PLACEHOLDER.fullmatch(content) and not (answer and _WEAK_PLACEHOLDER.fullmatch(content)):
            answer = content.strip()
    return answer


def _unbraced(text: str, start: int, closings: dict[int, int]) -> int | None:
    """Where the number, letter or command after a box ends; None if there is none, as where words follow."""
    begin = start + text.startswith(("-", "+"), start)
    if number := _NUMBER.match(text, begin):
        return number.end()
    if command := _COMMAND.match(text, begin):
        return _after_arguments(text, command, closings)
    letter = text[begin : begin + 1]
    in_word = text[begin + 1 : begin + 9].lstrip()[:1].isalpha()
    return begin + 1 if letter.isascii() and letter.isalpha() and not in_word else None


def _after_arguments(text: str, command: re.Match, closings: dict[int, int]) -> int:
    """Where a command ends, its arguments included, braced or not."""
    failed = command.start()  # where no formula ends
    end, left = command.end(), _ARGUMENTS.get(command.group(), 0)
    if command.group() == r"\sqrt" and (root := _ROOT.match(text, end)):
        end = root.end()
    while left:
        left -= 1
        while text[end : end + 1].isspace():
            end += 1
        if end in closings:
            end = closings[end] + 1
        elif inner := _COMMAND.match(text, end):
            left += _ARGUMENTS.get(inner.group(), 0)
            end = inner.end()
        elif text[end : end + 1].isalnum():
            end += 1
        else:
            return failed
    while end in closings:
        end = closings[end] + 1
    return end


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
