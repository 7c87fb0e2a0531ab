"""Answers in words: yes, no solution, Monday, (C)."""

from __future__ import annotations

import re

from espl_jax.environments.grading.latex import CLOSE, OPEN

_NOTHING = re.compile(
    r"(?:there (?:is|are) )?(?:none|(?:no|empty)(?: (?:real|integer|such|possible|valid))*"
    r" (?:solutions?|roots?|values?|numbers?|integers?|set|triples?|pairs?|functions?))(?: exists?)?"
)
_UNDEFINED = re.compile(r"(?:it |the limit |limit )?(?:does not|doesnt) exist|dne|undefined")
_NO_SET = re.compile(rf"\\emptyset|{OPEN}\s*{CLOSE}")


def read_words(text: str) -> str:
    r"""The words that an answer consists of, in one spelling; empty if it is mathematics.

    What is in `\text{}` is words, and so is a bare word of four letters; shorter ones may be products.
    """
    if _NO_SET.fullmatch(text):
        return "none"
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).replace("\\", " \\ ")
    bare = " ".join(bare.replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "").split())
    choice = re.fullmatch(r"\(\s*([A-Z])\s*\)|([A-Z])", bare)
    if choice:
        return choice.group(1) or choice.group(2)
    if not re.fullmatch(r"[A-Za-z][A-Za-z .\-]*", bare):
        return ""
    lower = re.sub(r"[ .\-]+", " ", bare).strip().lower()
    if not ("\\text" in text or re.search(r"[a-z]{4}", lower) or lower in ("yes", "no", "dne")):
        return ""
    if _NOTHING.fullmatch(lower):
        return "none"
    if _UNDEFINED.fullmatch(lower):
        return "dne"
    if re.search(r"\b(?:and|or)\b", lower):
        return ""
    return re.sub(r"^(?:an?|the) (?=.)", "", lower)
