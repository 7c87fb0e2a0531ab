r"""What an answer consists of: values, lists, sets, tuples, intervals, unions, words.

The rules are those of a lenient competition grader, and about form alone; whether two values are equal is
for `equivalence`.

- Several values may be written with commas, semicolons, "and", "or" or `\pm`; their order is free unless they
  are in parentheses. Tuples and intervals keep order and brackets; `1 < x \le 2` is the interval `(1, 2]`.
- What names a value (`x =`, `x \in`, `f(2) =`, words) may be there or not. An equation in one unknown that is
  not solved for it, such as `2x = 6`, is no value. Of a chain of equations the last side counts, and what is
  said after `\approx` does not.
- A unit may be there or not; two that differ are wrong (none is converted). A percent or degree sign may too:
  `50\%` is 50 or 1/2, `180^\circ` is 180 or pi.
- Commas between groups of three digits may be thousands separators or not: both readings are tried.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from espl_jax.environments.grading.latex import CLOSE, OPEN, exact_decimals, simplify
from espl_jax.environments.grading.units import take_off_unit
from espl_jax.environments.grading.words import read_words

_OPENING, _CLOSING = "([{" + OPEN, ")]}" + CLOSE


@dataclasses.dataclass(frozen=True)
class Answer:
    r"""One answer, or a part of one.

    Attributes:
      kind: `value`, `words`, `list` (order free), `set`, `tuple` (intervals too) or `union`.
      text: of a value its LaTeX, of words their letters, of a tuple its two brackets.
      items: the parts of the other kinds.
      left: what stood before `=`.
      naming: what that is: a `name`, an `expression` whose value this is, or one side of an `equation`.
      unit: of a value, in one spelling; empty for none.
      scale: `percent`, `degree` or nothing.
    """

    kind: str
    text: str = ""
    items: tuple[Answer, ...] = ()
    left: str = ""
    naming: str = ""
    unit: str = ""
    scale: str = ""


_REALS = Answer("tuple", "()", (Answer("value", r"-\infty"), Answer("value", r"\infty")))


def readings(text: str) -> list[Answer]:
    """What a text may mean: one reading, or two where commas may separate thousands or values."""
    text = _strip(_unbox(simplify(text)))
    if words := read_words(text):
        return [_of_words(words)]
    merged = _THOUSANDS.sub(lambda number: number.group().replace(",", ""), text)
    return [_read(each) for each in dict.fromkeys((merged, text))]


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def _unbox(text: str) -> str:
    while match := _AROUND.fullmatch(text):
        text = (match[1] or match[2]).strip()
    return text


# A box around everything, or a font around everything where that has digits and so is more than words.
_AROUND = re.compile(r"\\f?box(?:ed)?\s*\{(.*)\}|\\text\s*\{([^{}]*\d[^{}]*)\}", re.DOTALL)
_ANSWER_IS = r"(?i:(?:the |my )?(?:final |correct )?answer\s*(?:is\s*:?|:))"
_LABEL = re.compile(rf"^(?:\\text\s*\{{(?:[^{{}}]*:|\s*{_ANSWER_IS})\s*\}}|{_ANSWER_IS})")


def _strip(text: str) -> str:
    return _LABEL.sub("", text.strip().rstrip(".,;:\\")).strip()


def _of_words(words: str) -> Answer:
    if words in ("all real numbers", "all reals", "real numbers"):
        return _REALS
    return Answer("words", words)


_SEPARATOR = re.compile(
    r",|;|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\text\s*\{\s*,?\s*(?:and|or)\s*\}"
    r"|\\(?:lor|land|vee|wedge)(?![a-zA-Z])"
)
_UNION = re.compile(r"\\cup(?![a-zA-Z])")
_EQUALS = re.compile(r"(?<![<>!\\:])=")
_MEMBER = re.compile(r"\\in(?![a-zA-Z])")
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|doteq)(?![a-zA-Z])")
_SUCH_THAT = re.compile(r"[a-zA-Z]\s*(?:\\in\s*\\mathbb\{R\})?\s*(?::|\\mid|\|)\s*(.*)", re.DOTALL)
# Open ends as ]0, 1[.
_OUTWARD = re.compile(r"(?=\]|.*\[$)([\[\]])([^\[\]]*,[^\[\]]*)([\[\]])")
_ORDER = re.compile(r"\\le |\\ge |<|>")


def _cut(text: str, separator: re.Pattern) -> list[str]:
    """Parts between separators that are in no brackets, stripped; without empty ones."""
    inside, depth = [], 0
    for character in text:
        depth += (character in _OPENING) - (character in _CLOSING)
        inside.append(depth > 0)
    parts, start = [], 0
    for match in separator.finditer(text):
        if not inside[match.start()]:
            parts.append(text[start : match.start()])
            start = match.end()
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _enclosed(text: str) -> bool:
    """Whether one pair of brackets, of whatever kinds, is around all of a text."""
    if not (text[:1] in ("(", "[", OPEN) and text[-1:] in _CLOSING and len(text) > 2):
        return False
    depth = 0
    for i, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if not depth:
            return i == len(text) - 1
    return False


def _read(text: str) -> Answer:
    if match := _OUTWARD.fullmatch(text):
        text = f"{'(['[match[1] == '[']}{match[2]}{')]'[match[3] == ']']}"
    parts = [each for part in _cut(text, _SEPARATOR) for each in _signs(part)]
    items = [_read_one(part) for part in parts]
    if len(items) != 1:
        return _of_list(items)
    return items[0]


def _of_list(items: list[Answer]) -> Answer:
    if items and all(item.kind == "tuple" and item.naming and not item.left for item in items):
        # Inequalities: x < 1 or x > 2.
        return Answer("union", items=tuple(items))
    names = {re.sub(r"_\{?\w+\}?", "", item.left) for item in items if item.naming == "name"}
    if len(names) == 1:
        # Values of one unknown, x_1 and x_2: their order is free.
        items = [dataclasses.replace(item, left="", naming="") for item in items]
    return Answer("list", items=tuple(items))


def _signs(text: str) -> Iterator[str]:
    r"""What a text with `\pm` stands for; `\mp` has the other sign, several `\pm` are independent."""
    match = re.search(r"\\pm(?![a-zA-Z])\s*", text)
    if not match or text.startswith(OPEN) or text.count(r"\pm") > 3:
        yield text
        return
    opposite = re.compile(r"\\mp(?![a-zA-Z])\s*")
    for sign, other in (("+", "-"), ("-", "+")):
        yield from _signs(opposite.sub(other, f"{text[: match.start()]}{sign}{text[match.end() :]}"))


def _read_one(text: str) -> Answer:
    if _APPROXIMATELY.match(text):
        return Answer("value")
    text = (_cut(text, _APPROXIMATELY) or [""])[0]
    order = _interval(text)
    if order is not None:
        return order
    sides = _cut(text, _EQUALS)
    left = ""
    if len(sides) > 1:
        # Of a chain x = y = 5 the first side says what it is.
        left, text = sides[0], sides[-1]
    members = _cut(text, _MEMBER)
    if len(members) == 2 and not left:
        left, text = members
    if left:
        return dataclasses.replace(_structure(text), left=left, naming=_naming(left))
    return _structure(text)


def _naming(left: str) -> str:
    r"""What a left side is.

    Letters with indices, f(2) and words are a name. What has several letters, as `a + b`, or none is an
    expression, whose value was perhaps asked for; one letter in anything else makes an equation to solve.
    """
    if re.fullmatch(r"(?:\\?[a-zA-Z]+|\\text\s*\{[^{}]*\})(?:_(?:\{[^{}]*\}|\w))?'*(?:\(.*\))?", left):
        return "name"
    if re.fullmatch(r"\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\)", left):
        return "name"
    letters = re.findall(r"[a-zA-Z]", re.sub(r"\\text\s*\{[^{}]*\}|\\[a-zA-Z]+", "", left))
    return "equation" if len(set(letters)) == 1 else "expression"


def _interval(text: str) -> Answer | None:
    r"""The interval that an inequality in one unknown describes, or None."""
    if _enclosed(text):
        return None
    signs = [match.group().strip() for match in _ORDER.finditer(text)]
    parts = [part.strip() for part in _ORDER.split(text)]
    if not signs or "=" in text or len(signs) > 2 or not all(parts):
        return None
    falling = {sign in (">", r"\ge") for sign in signs}
    if len(falling) > 1:
        return None
    if falling == {True}:
        parts, signs = parts[::-1], signs[::-1]
    closed = [sign in (r"\le", r"\ge") for sign in signs]
    name = re.compile(r"\\?[a-zA-Z]+(?:_(?:\{[^{}]*\}|\w))?")
    if len(parts) == 3 and name.fullmatch(parts[1]):
        ends, brackets = (parts[0], parts[2]), "[("[not closed[0]] + "])"[not closed[1]]
    elif len(parts) == 2 and name.fullmatch(parts[0]):
        ends, brackets = (r"-\infty", parts[1]), "(" + "])"[not closed[0]]
    elif len(parts) == 2 and name.fullmatch(parts[1]):
        ends, brackets = (parts[0], r"\infty"), "[("[not closed[0]] + ")"
    else:
        return None
    return Answer("tuple", brackets, tuple(_value(end) for end in ends), naming="name")


def _structure(text: str) -> Answer:
    text = text.strip()
    if text == r"\mathbb{R}":
        return _REALS
    if words := read_words(text):
        return _of_words(words)
    parts = _cut(text, _UNION)
    if len(parts) > 1:
        return Answer("union", text, tuple(_structure(part) for part in parts))
    if _enclosed(text):
        inner = text[1:-1].strip()
        braces = text[0] == OPEN
        items = _cut(inner, re.compile("[,;]") if not braces else _SEPARATOR)
        if braces and (condition := _SUCH_THAT.fullmatch(inner)):
            return _read(condition.group(1))
        if braces and not re.search(r"\\mid|[:|]", inner):
            return Answer("set", items=tuple(_read_one(each) for item in items for each in _signs(item)))
        if len(items) > 1 and not braces:
            return Answer("tuple", text[0] + text[-1], tuple(_read_one(item) for item in items))
    return _value(text)


def _value(text: str) -> Answer:
    text, unit, scale = take_off_unit(_strip(text))
    return Answer("value", exact_decimals(text), unit=unit, scale=scale)
