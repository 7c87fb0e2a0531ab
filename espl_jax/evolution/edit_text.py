"""Pieces of text that the readers of replies share: ids, and lines of clean text."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

# "C G0": ids, and letters of ids, with at least one whole id. A lone letter of an id.
_IDS = re.compile(r"\W*(?:(?:[GCS]\W+)*[GCS]\d{1,6}(?:\W+[GCS]\d{0,6})*|[GCS])\W*")
_NO_TEXT = {"none", "nothing", "n/a", "no change", "empty"}
# "(write the principle here)": a blank that was not filled in.
_BLANK = re.compile(r"[(\[<][^()\[\]<>]*\b(?:principle|instruction)s?\b[^()\[\]<>]*[)\]>]\.?", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]{2}")


def ids_in(value: Any) -> tuple[str, ...]:
    """Ids from "G0", "[g0]", 0, "G0, G1" or a list of such; a bare number means a principle of the prompt."""
    items = value if isinstance(value, list) else [value]
    named = " ".join(
        str(item) for item in items if isinstance(item, str | int) and not isinstance(item, bool)
    )
    found = re.findall(r"\b([GCSgcs]?)(\d{1,6})\b", named)
    return tuple(dict.fromkeys(f"{letter.upper() or 'G'}{int(number)}" for letter, number in found))


def clean(value: Any) -> str:
    """One line of text without control characters, lone surrogates or a leading number such as "G0."."""
    if not isinstance(value, str):
        value = " ".join(item for item in value if isinstance(item, str)) if isinstance(value, list) else ""
    line = " ".join(printable(value).split())
    return re.sub(r"^\[?[GC]\d+\]?[.:)]\s*", "", line)


def says_nothing(principle: str) -> bool:
    """Returns whether a principle is a blank: ids, a letter of one, "(none)", or "(the new principle)"."""
    words = principle.strip()
    if _BLANK.search(words) and not _WORD.search(_BLANK.sub(" ", words)):
        return True
    if not any(map(str.isalpha, words)) or _IDS.fullmatch(words):
        return True
    return words.strip("()[].").lower() in _NO_TEXT


def printable(text: str, keep: str = "") -> str:
    """The text with spaces for control characters and lone surrogates."""
    return "".join(
        " " if character not in keep and unicodedata.category(character) in ("Cc", "Cs") else character
        for character in text
    )
