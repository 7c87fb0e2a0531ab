"""Reads an edit that is almost JSON, every character of its texts or nothing.

Models forget commas, brackets and backslashes before quotes, and write other quotes. A text can still be
read as long as only one of its quotes can be the last: one that the next field of an edit follows, or the end
of the object. Where several can be the last, or where the text would end inside its own quotes or braces, the
object is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from espl_jax.evolution.edit_fields import KNOWN, SHORT, same_meaning

_GAP = r"(?:\s|//[^\n]{0,200}\n|\#[^\n]{0,200}\n|/\*[^*]{0,200}\*/)*"
_QUOTE = "[\"'“”„‟″]"
_CLOSING = {'"': '"', "'": "'"} | dict.fromkeys("“”„‟″", '"“”„‟″')
_NAMES = "|".join(sorted(KNOWN, key=len, reverse=True))
_KEY = rf"(?:{_QUOTE}(?P<quoted>[^\"'“”{{}}\n]{{1,40}}){_QUOTE}|(?P<bare>\w{{1,40}}))\s*:"

KNOWN_OBJECT = re.compile(rf"\{{\s*(?:{_QUOTE}\s*(?:{_NAMES})\s*{_QUOTE}|(?:{_NAMES}))\s*:", re.IGNORECASE)
"""Where an object begins whose first field is one of an edit."""

_SKIPPED = re.compile(rf"{_GAP}(?:,{_GAP})*")
_FIELD = re.compile(_KEY)
_FLAT_LIST = re.compile(r"\[([^\[\]{}]*)\]")
_WRAPPED = re.compile(rf"(?:\[{_GAP})?(?=\{{)")
_BARE_VALUE = re.compile(r"[^,{}\[\]\"\n]*")

# What follows a text: its object's next field, which a comma or a new line sets apart, or its end.
_KNOWN_KEY = rf"(?:{_QUOTE}(?P<quoted>{_NAMES}){_QUOTE}|(?P<bare>{_NAMES}))\s*:"
_NEXT_FIELD = re.compile(rf"(?:{_GAP},{_GAP}|[^\S\n]*\n\s*(?={_QUOTE})){_KNOWN_KEY}", re.IGNORECASE)
_NEXT_FIELD_WITHOUT_COMMA = re.compile(rf"\s*(?={_QUOTE}){_KNOWN_KEY}", re.IGNORECASE)
_FIELD_INSIDE = re.compile(
    rf"(?:{_QUOTE}\s*,\s*{_QUOTE}\w{{1,40}}|[,\n]\s*{_QUOTE}(?:{_NAMES})){_QUOTE}\s*:", re.IGNORECASE
)
_COMMENT_INSIDE = re.compile(r"(?:^|\s)(?://|\#|/\*)")
_BRACE = re.compile(rf"{_GAP}(?:,{_GAP})?\}}")
_GOES_ON = re.compile(r"[^\S\n]*(?:[,;]?\s*(?:[\]}{]|\Z)|,?[^\S\n]*(?:\n|```|//|\#))")
_BRACKET = re.compile(rf"{_GAP}(?:,{_GAP})?(?:\]|```)")
_BETWEEN = re.compile(r"[\s,;`\]]*")

_LIST_END = re.compile(r"\n```|\][^\S\n]*(?:\}[^\S\n]*)?\n")
_RUNS_ON = re.compile(rf"{_QUOTE}{_GAP}(?:,{_GAP})?[\}}\]]")


class LooseObject(NamedTuple):
    """What was read.

    Attributes:
      fields: of the object; of one that was cut off, those before the cut.
      end: the position behind it; of a wrapper, that of the first object in it.
      problem: empty, `truncated`, `broken_json`, `unclear_end`, or `wrapper` for what only holds others.
    """

    fields: dict[str, Any]
    end: int
    problem: str = ""


class _End(NamedTuple):
    """A quote that may end a text: its position, and what follows it, a `field`, a `field without comma`, a
    `repeated field` (the object has it by another name), a `brace` (before what may follow an object), a
    `brace in a sentence` or a `bracket`."""

    quote: int
    kind: str


def read_loose(text: str, start: int, stop: int) -> LooseObject:
    """Reads an object.

    Args:
      text: the reply, every backslash in it part of an escape of JSON (see `json_replies.escape_latex`).
      start: position of the object's brace.
      stop: where the next edit begins or the reply ends.
    """
    fields: dict[str, Any] = {}
    position, is_bare = start + 1, False
    while True:
        position = _end(_SKIPPED, text, position, stop)
        if position >= stop:
            is_last = stop == len(text)
            return LooseObject(fields, stop, "truncated" if is_last or not fields else "")
        if text[position] in "}]`":
            end = position + (text[position] == "}")
            if is_bare and (end == position or _more_braces(text, end, stop)):
                return LooseObject(fields, stop, "unclear_end")
            return LooseObject(fields, end, "" if fields else "broken_json")
        key = _FIELD.match(text, position, stop)
        if key is None:
            return LooseObject(fields, stop, "truncated" if _is_cut(text, position, stop) else "broken_json")
        name = _name(key)
        position = _end(_SKIPPED, text, key.end(), stop)
        if wrapped := _WRAPPED.match(text, position):
            if KNOWN.isdisjoint(fields):
                return LooseObject({}, wrapped.end(), "wrapper")
            return LooseObject(fields, stop, "broken_json")
        is_bare = name not in SHORT and text[position : position + 1] not in (*_CLOSING, "[")
        value = _read_value(text, position, stop, name, fields)
        if isinstance(value, str):
            return LooseObject(fields, stop, value)
        fields[name], position = value


def runs_on(text: str, end: int, stop: int) -> bool:
    """Whether an object may end later than at `end`: between there and `stop`, where the next edit begins,
    something looks like the end of an object. Lines after those of a list or a fence are prose.
    """
    list_end = _LIST_END.search(text, end, stop)
    stop = list_end.start() if list_end else stop
    decoder = json.JSONDecoder(strict=False)
    while match := _RUNS_ON.search(text, end, stop):
        begin = text.find("{", end, match.start())
        if begin < 0:
            return True
        try:
            _, end = decoder.raw_decode(text, begin)  # an example of JSON in the prose
        except (ValueError, RecursionError):
            return True
    return False


def _more_braces(text: str, end: int, stop: int) -> bool:
    """Whether a text without quotes may go on behind `end`: a brace follows that ends no wrapper."""
    return "}" in re.sub(r"\]\s{0,50}\}", "", text[end:stop])


def _is_closed(text: str, stop: int) -> bool:
    """Whether a brace ends what is before `stop`, brackets and white space aside."""
    return re.search(r"\}[\s,;`\]]*\Z", text[max(0, stop - 200) : stop]) is not None


def _end(pattern: re.Pattern[str], text: str, position: int, stop: int) -> int:
    """Where the match of a pattern that matches everywhere ends."""
    found = pattern.match(text, position, stop)
    assert found is not None
    return found.end()


def _name(key: re.Match[str]) -> str:
    return (key["quoted"] or key["bare"]).strip().lower()


def _is_cut(text: str, position: int, stop: int) -> bool:
    """Whether the reply ends inside the name of a field."""
    return stop == len(text) and re.fullmatch(rf"{_QUOTE}?\w*{_QUOTE}?\s*", text[position:]) is not None


def _read_value(
    text: str, position: int, stop: int, name: str, fields: dict[str, Any]
) -> tuple[Any, int] | str:
    """(value, where the text goes on), or the reason why there is none."""
    opening = text[position] if position < stop else ""
    if opening == "[":
        found = _FLAT_LIST.match(text, position, stop)
        if found is None:
            return "broken_json" if stop < len(text) or _is_closed(text, stop) else "truncated"
        if name in SHORT:
            return found[1], found.end()
        try:
            return json.loads(found[0], strict=False), found.end()
        except ValueError:
            return "broken_json"
    if opening not in _CLOSING:
        return _read_bare(text, position, stop)
    if name in SHORT:
        closing = next(_closing_quotes(text, position + 1, stop, _CLOSING[opening]), None)
        if closing is None:
            return "broken_json" if stop < len(text) or _is_closed(text, stop) else "truncated"
        return _decode(text[position + 1 : closing]), closing + 1
    chosen = _the_end(text, list(_ends(text, position + 1, stop, _CLOSING[opening], {*fields, name})))
    if chosen is None:
        return "unclear_end" if _is_closed(text, stop) else "truncated"
    if isinstance(chosen, str):
        return chosen
    raw = text[position + 1 : chosen.quote]
    if _FIELD_INSIDE.search(raw) or _is_open(raw, _CLOSING[opening]):
        return "unclear_end"
    return _decode(raw), chosen.quote + 1


def _is_open(raw: str, closing: str) -> bool:
    """Whether a text leaves a brace or a quote open, so that its end may be one of JSON inside it."""
    quotes = sum(
        closing != "'" or re.match(r"\w'\w", raw[max(0, quote - 1) : quote + 2]) is None  # no apostrophe
        for quote in _closing_quotes(raw, 0, len(raw), closing)
    )
    return quotes % 2 == 1 or raw.count("{") > raw.count("}")


def _read_bare(text: str, position: int, stop: int) -> tuple[Any, int] | str:
    """A value without quotes: it has no punctuation that structures objects."""
    found = _BARE_VALUE.match(text, position, stop)
    assert found is not None
    if found.end() == len(text):
        return "truncated"
    if text[found.end()] in '"{[':
        return "unclear_end"
    word = _decode(found[0].strip())
    if word in ("null", "true", "false") or re.fullmatch(r"-?\d{1,9}", word):
        return json.loads(word), found.end()
    return "unclear_end" if _COMMENT_INSIDE.search(word) else (word, found.end())


def _closing_quotes(text: str, start: int, stop: int, closing: str) -> Iterator[int]:
    """Positions of all quotes without a backslash before them."""
    for match in re.compile(rf"\\.|[{closing}]", re.DOTALL).finditer(text, start, stop):
        if match[0][0] != "\\":
            yield match.start()


def _ends(text: str, position: int, stop: int, closing: str, seen: set[str]) -> Iterator[_End]:
    """All places where the text in quotes that begins at `position` may end."""
    repeated = frozenset().union(*map(same_meaning, seen))
    for quote in _closing_quotes(text, position, stop, closing):
        after = quote + 1
        if (field := _NEXT_FIELD.match(text, after, stop)) and _name(field) not in seen:
            yield _End(quote, "repeated field" if _name(field) in repeated else "field")
        elif (field := _NEXT_FIELD_WITHOUT_COMMA.match(text, after, stop)) and _name(field) not in seen:
            yield _End(quote, "field without comma")
        elif brace := _BRACE.match(text, after, stop):
            yield _End(quote, "brace" if _GOES_ON.match(text, brace.end(), stop) else "brace in a sentence")
        elif _BRACKET.match(text, after, stop) or (
            stop < len(text) and _end(_BETWEEN, text, after, stop) == stop
        ):
            yield _End(quote, "bracket")


def _the_end(text: str, ends: Sequence[_End]) -> _End | str | None:
    """The one place where a text ends, the reason why it cannot be told, or None if there is no place."""
    field = next((end for end in ends if end.kind == "field"), None)
    if field is not None:
        earlier = {end.kind for end in ends if end.quote < field.quote}
        return field if earlier <= {"bracket", "brace in a sentence"} else "unclear_end"
    if ends and (fence := text.find("\n```", ends[0].quote)) >= 0:
        ends = [end for end in ends if end.quote < fence]
    for kind in ("brace", "brace in a sentence", "bracket"):
        chosen = [end for end in ends if end.kind == kind]
        if chosen:
            # A brace in a sentence is one of the text's own if it stands before the end.
            inside = {
                end for end in ends if end.kind == "brace in a sentence" and end.quote < chosen[0].quote
            }
            return chosen[0] if len(ends) == 1 + len(inside) else "unclear_end"
    return None


def _decode(raw: str) -> str:
    """The text that was meant: escapes read, quotes without a backslash kept."""
    escaped = re.sub(r"\\.|\"", lambda match: '\\"' if match[0] == '"' else match[0], raw, flags=re.DOTALL)
    return json.loads(f'"{escaped}"', strict=False)
