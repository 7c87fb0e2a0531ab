"""What may stand around a value: units, currency, percent, degrees, endings of ordinals."""

from __future__ import annotations

import re

_UNITS = {
    "cm": "centimeter centimetre",
    "mm": "millimeter millimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inche",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "s": "sec second",
    "min": "minute",
    "h": "hour hr",
    "g": "gram",
    "kg": "kilogram",
    "mg": "milligram",
    "lb": "pound",
    "oz": "ounce",
    "l": "liter litre",
    "ml": "milliliter",
    "dollar": "usd buck",
    "": "unit",
}
_UNIT = {spelling: unit for unit, others in _UNITS.items() for spelling in (unit, *others.split())}
_KNOWN = "cm|mm|km|kg|mg|lbs?|ft|yd|oz|ml|mph|sec|min|hrs?|usd|cents?"
_TEXT_UNIT = re.compile(r"^(.*?\S)\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?([23])\}?)?$", re.DOTALL)
_NO_UNIT = re.compile(r"\d|\b(?:or|and|not|to|than|more|less|most|least|mod|plus|minus|times|base)\b")
_BARE_UNIT = re.compile(
    rf"^(.*[\d)}}])(?:\s*({_KNOWN})|\s+((?:sq |square |cubic )?[A-Za-z]{{4,}}(?: [A-Za-z]+)*))"
    r"\s*(?:\^\s*\{?([23])\}?)?$",
    re.DOTALL,
)
_CURRENCY = re.compile(r"^(-?)\s*(?:\\text\s*\{\s*)?\\(\$|euro|pounds)\s*\}?\s*")
_PERCENT = re.compile(r"^(.*?)\s*(?:\\?%|\\text\s*\{\s*(?:percent|\\?%|pct)\s*\}|percent)$", re.DOTALL)
_DEGREE = re.compile(r"^(.*?)\s*(?:\^\\circ|\\text\s*\{\s*degrees?\s*\}|degrees?)$", re.DOTALL)
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREES_INSIDE = re.compile(r"(\d+)\s*\^\\circ")
_ORDINAL = re.compile(r"(?<=\d)\s*\^?\s*\{?\s*(?:\\text\s*\{\s*)?(?:st|nd|rd|th)\s*\}*$")


def take_off_unit(text: str) -> tuple[str, str, str]:
    """A value without what is said around it, its unit in one spelling, and `percent`, `degree` or nothing.

    What is said around a value is a unit, a sign of currency, percent or degrees, or an ordinal's ending. A
    bare letter is no unit but a variable. Degrees within functions become radians.
    """
    unit = scale = ""
    text = _ORDINAL.sub("", text)
    if match := _CURRENCY.match(text):
        unit = "dollar" if match.group(2) == "$" else match.group(2)
        text = match.group(1) + text[match.end() :]
    if match := _PERCENT.match(text):
        text, scale = match.group(1), "percent"
    elif _FUNCTION.search(text):
        text = _DEGREES_INSIDE.sub(r"(\\frac{\1 \\pi}{180})", text)
    elif match := _DEGREE.match(text):
        text, scale = match.group(1), "degree"
    elif (match := _TEXT_UNIT.match(text)) and not _NO_UNIT.search(match.group(2)):
        text, unit = match.group(1), _unit(match.group(2), match.group(3))
    elif (match := _BARE_UNIT.match(text)) and not _NO_UNIT.search(match.group(3) or ""):
        text, unit = match.group(1), _unit(match.group(2) or match.group(3), match.group(4))
    return text.strip().removeprefix("+").strip(), unit, scale


def _unit(words: str, power: str | None) -> str:
    r"""A unit in one spelling: `square centimeters`, `sq cm` and `cm^2` are `cm^2`."""
    names = words.lower().replace(".", "").split()
    for name, exponent in (("square", "2"), ("sq", "2"), ("cubic", "3")):
        if name in names:
            names.remove(name)
            power = exponent
    spelled = " ".join(_UNIT.get(name, _UNIT.get(name.rstrip("s"), name.rstrip("s"))) for name in names)
    return f"{spelled}^{power}" if power and spelled else spelled
