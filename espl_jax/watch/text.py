"""Text for a terminal."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")


def safe(text: str) -> str:
    """Returns text that a model wrote as one line without characters that control a terminal."""
    return _CONTROL.sub("\ufffd", re.sub(r"\s*[\n\r\t]\s*", " ", text.strip()))


def sparkline(values: Sequence[float], width: int) -> str:
    """Returns the newest values as one bar each; more values than `width` are averaged in equal parts."""
    values = [value for value in values if math.isfinite(value)]
    if not values or width < 1:
        return ""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[begin:end]) / (end - begin) for begin, end in itertools.pairwise(edges)]
    low, high = min(values), max(values)
    if high == low:
        return _BARS[3] * len(values)
    top = len(_BARS) - 1
    return "".join(_BARS[round((value - low) / (high - low) * top)] for value in values)


def number(value: float) -> str:
    """Formats a number with about three significant digits."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
