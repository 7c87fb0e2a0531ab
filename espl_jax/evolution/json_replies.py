"""Reads JSON objects out of whatever a language model wrote around, inside and after them.

A reply is never trusted: every object is read by itself, strictly first, then by `loose_json`, so one broken
object costs itself alone, and no text can hang or exhaust the stack. An object whose texts may have lost
characters is none.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from espl_jax.evolution.loose_json import KNOWN_OBJECT, read_loose, runs_on

_MAX_CHARS = 100_000
_MAX_OBJECTS = 100
_MAX_DEPTH = 8

_DECODER = json.JSONDecoder(strict=False)

# What follows \t, \n, \r or \u in the LaTeX commands that JSON takes for an escape and some letters.
_LATEX = (
    r"t(?:an|anh|au|binom|frac|ilde|imes|o|op|riangle|riangleq|ext|extbf|extit|extrm|"
    r"exttt|heta|herefore|hickapprox|ag)"
    r"|n(?:e|eq|eg|abla|mid|ot|otin|sim|u|exists|geq|leq|cong|parallel|ewline)"
    r"|r(?:angle|brace|ceil|floor|ho|ight|ightarrow|ightleftharpoons|vert|Vert|m|oot)"
    r"|u(?:nderbrace|nderline|nderset|parrow|plus|psilon)"
)
_BACKSLASH = re.compile(
    r'\\(?:(?P<legal>[\\"/]|u[0-9a-fA-F]{4})'
    rf"|(?P<latex>[bf](?=[A-Za-z])|(?:{_LATEX})(?![A-Za-z]))"
    r"|(?P<control>[bfnrt])"
    r"|(?P<apostrophe>'))?"
)
_AFTER_PROSE = re.compile(r"(?:^|[\n>`])[\s\[]*\Z")
"""What stands before an object that begins a line, or follows a tag or a fence."""

_OWN_FIELDS = {"op", "operation", "action", "principle", "search", "replace"}
_OBJECT = re.compile(
    r"""\{\s*(?:["'“”][^"'“”{}\n]{1,40}["'“”]|op|operation|action|id|ids|principle|edits)\s*:"""
)


class Found(NamedTuple):
    """One JSON object of a reply, or the place where one should have been.

    Attributes:
      value: the object, or None if it could not be read; of one that was cut off, the fields that are whole.
      text: its text as it was.
      problem: empty, `truncated`, `broken_json`, `unclear_end` or `too_many`.
    """

    value: dict[str, Any] | None
    text: str
    problem: str = ""


def begins_with_json(text: str) -> bool:
    """Whether the reply sets off with JSON at once, fenced or bare."""
    return re.match(r"\s*(?:```\w*\s*)?[\[{]", text) is not None


def has_empty_list(text: str) -> bool:
    """Whether the reply holds `[]`, a deliberate nothing."""
    return re.search(r"\[\s*\]", text[:_MAX_CHARS]) is not None


def json_lists(text: str) -> list[list[Found]]:
    """The objects of a reply, one list for each JSON list in it, in order.

    Read are: prose and fences around, comments, trailing or missing commas and brackets, smart or single
    quotes, quotes inside strings, LaTeX backslashes, a list cut off in its middle (the object that was cut
    is marked as `truncated`). An object in which a text may end at several places is marked as `unclear_end`.
    Objects one after the other without brackets are one list. Never raises.
    """
    # The answer stands first where the reply begins with it and last otherwise.
    text = text[:_MAX_CHARS] if begins_with_json(text) else text[-_MAX_CHARS:]
    text = escape_latex(text)
    lists: list[list[Found]] = []
    end = 0
    for start, stop, found in _objects(text):
        if not lists or "]" in text[end:start]:
            lists.append([])
        lists[-1].extend(found)
        end = stop
    return [found for found in lists if found]


def escape_latex(text: str) -> str:
    r"""Doubles the backslashes that JSON would misread: `\frac` is LaTeX, not a form feed and "rac".

    JSON escapes stay: `\\`, `\"`, `\/`, `\u` with four hexadecimal digits, and the letters b, f, n, r, t, but
    not where these begin LaTeX: b and f before any letter (nobody means a backspace), the others where all
    the letters that follow spell a known command (`\times`, `\neq`, but not `\nThen`).
    """

    def rewrite(match: re.Match[str]) -> str:
        if match["apostrophe"]:
            return "\\u0027"  # no end of a string in single quotes either
        if match["legal"] or match["control"]:
            return match[0]
        return "\\" + match[0]

    return _BACKSLASH.sub(rewrite, text)


def _objects(text: str) -> Iterator[tuple[int, int, list[Found]]]:
    """Yields (start, end, what was found) for every outermost object; a wrapper gives all that it holds.

    An object that begins in another one that could not be read, before its braces are closed, is none.
    """
    starts = [match.start() for match in KNOWN_OBJECT.finditer(text)]

    def next_edit(position: int) -> int:
        return next(iter(starts[bisect.bisect_left(starts, position) :]), len(text))

    position, unread = 0, None
    for _ in range(_MAX_OBJECTS):
        match = _OBJECT.search(text, position)
        if match is None:
            return
        start = match.start()
        end, found = _read(text, start, match.end(), next_edit)
        if unread is not None and not _is_inside(text, unread, start):
            unread = None
        if unread is not None:
            found = [Found(None, each.text, each.problem or "unclear_end") for each in found]
        elif any(each.problem for each in found):
            unread = start
        yield start, end, found
        position = end
    if match := _OBJECT.search(text, position):
        yield match.start(), len(text), [Found(None, text[match.start() :], "too_many")]


def _is_inside(text: str, outer: int, start: int) -> bool:
    """Whether braces of what begins at `outer` are open at `start`, and no prose or line sets it apart."""
    is_open = text.count("{", outer, start) > text.count("}", outer, start)
    return is_open and _AFTER_PROSE.search(text[max(0, start - 50) : start]) is None


def _read(text: str, start: int, inside: int, next_edit: Callable[[int], int]) -> tuple[int, list[Found]]:
    """(end, what was found) of the object at `start`; `inside` is behind its first name."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        pass
    else:
        if _is_deep(value):
            return end, [Found(None, text[start:end], "broken_json")]
        if not runs_on(text, end, next_edit(end)):
            return end, [Found(inner, text[start:end]) for inner in _unwrap(value)]
    fields, end, problem = read_loose(text, start, next_edit(inside))
    if problem == "wrapper":
        return end, []
    if not problem and runs_on(text, end, next_edit(end)):
        problem = "unclear_end"
    return end, [Found(fields if problem in ("", "truncated") else None, text[start:end], problem)]


def _unwrap(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects inside a wrapper such as {"edits": [...]}; any other object is its own."""
    if not _OWN_FIELDS.isdisjoint(value):
        return [value]
    for inner in value.values():
        if isinstance(inner, dict):
            return [inner]
        if isinstance(inner, list) and all(isinstance(item, dict) for item in inner):
            return inner
    return [value]


def _is_deep(value: Any) -> bool:
    """Whether lists and dicts lie in each other more than `_MAX_DEPTH` deep; no recursion finds out."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(each, dict | list) for each in level)
