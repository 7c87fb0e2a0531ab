"""Reads JSON objects out of whatever a language model wrote around, inside and after them.

A reply is never trusted: every object is read by itself, strictly first, then through `json_repair` with its
length and depth bounded, so one broken object costs itself alone and no text can hang or exhaust the stack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import json_repair

_MAX_CHARS = 100_000
_MAX_OBJECTS = 100
_MAX_REPAIR_CHARS = 10_000
_MAX_DEPTH = 8

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
_NEXT_FIELD = re.compile(r"""["'\]]\s*,\s*["']\w*(?:["']\s*:|$)""")
_OWN_FIELDS = {"op", "operation", "action", "principle", "search", "replace"}
_SMART_QUOTES = str.maketrans("“”„‟″", '"' * 5)
_OBJECT = re.compile(
    r"""\{\s*(?:["'“”][^"'“”{}\n]{1,40}["'“”]|op|operation|action|id|ids|principle|edits)\s*:"""
)


class Found(NamedTuple):
    """One JSON object of a reply, or the place where one should have been.

    Attributes:
      value: the object, or None if it could not be read; of one that was cut off, the fields that are whole.
      text: its text as it was.
      problem: empty, `truncated`, `broken_json` or `too_many`.
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

    Repaired are: prose and fences around, comments, trailing or missing commas and brackets, smart or single
    quotes, quotes inside strings, LaTeX backslashes, a list cut off in its middle (the object that was cut
    is marked as `truncated`). Objects one after the other without brackets are one list. Never raises.
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
            return "'"
        if match["legal"] or match["control"]:
            return match[0]
        return "\\" + match[0]

    return _BACKSLASH.sub(rewrite, text)


def _objects(text: str) -> Iterator[tuple[int, int, list[Found]]]:
    """Yields (start, end, what was found) for every outermost object; a wrapper gives all that it holds."""
    decoder = json.JSONDecoder(strict=False)
    position = 0
    for _ in range(_MAX_OBJECTS):
        match = _OBJECT.search(text, position)
        if match is None:
            return
        start = match.start()
        try:
            value, end = decoder.raw_decode(text, start)
            if _is_deep(value):
                found = [Found(None, text[start:end], "broken_json")]
            else:
                found = [Found(inner, text[start:end]) for inner in _unwrap(value)]
        except (ValueError, RecursionError):
            following = _OBJECT.search(text, match.end())
            end = following.start() if following else len(text)
            found = _repair(text[start:end], last=following is None)
        yield start, end, found
        position = end
    if match := _OBJECT.search(text, position):
        yield match.start(), len(text), [Found(None, text[match.start() :], "too_many")]


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


def _repair(text: str, last: bool) -> list[Found]:
    """Reads one object that is not strict JSON; `last` says that the reply ends in it."""
    if re.fullmatch(r"""\{\s*["'“”]?\w+["'“”]?\s*:\s*\[\s*""", text):
        return []  # the head of a wrapper whose objects are read one by one
    straight = text.translate(_SMART_QUOTES) if "“" in text else text
    straight = straight[:_MAX_REPAIR_CHARS]
    problem = ""
    whole = _object_text(straight, last)
    if whole is None:
        # The fields before the one that was cut are whole.
        problem = "truncated"
        *_, cut = (0, *(match.start() + 1 for match in _NEXT_FIELD.finditer(straight)))
        whole = straight[:cut] + "}"
    straight = whole
    if _depth(straight) > _MAX_DEPTH:
        return [Found(None, text, "broken_json")]
    try:
        value = json_repair.loads(straight)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        value = None  # a fault of the repair costs one object, not the run
    if isinstance(value, list):
        value = next((item for item in value if isinstance(item, dict)), None)
    if not isinstance(value, dict) or not value:
        return [Found(None, text, problem or "broken_json")]
    return [Found(inner, text, problem) for inner in _unwrap(value)]


def _object_text(text: str, last: bool) -> str | None:
    """The part of `text` up to the object's own end, or None if the reply stops inside a string."""
    closed = re.search(r"""["'\]]\s*(?:,\s*)?(?:(?://|\#)[^\n]{0,200}\n\s*)?\}""", text)
    if closed:
        return text[: closed.end()]
    bare = text.rfind("}") + 1  # a value without quotes may stand before the brace
    if bare and len(re.findall(r'(?<!\\)"', text[:bare])) % 2 == 0:
        return text[:bare]
    whole = not last or text.rstrip(" \t\r\n,;`]").endswith(('"', "'"))
    return text if whole else None


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


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest
