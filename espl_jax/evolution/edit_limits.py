"""What a stage of reflection accepts of the edits proposed: each check keeps some and names those dropped."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from espl_jax.evolution.edits import Drop, Edit, Merge, Remove, describe, partition


def drop_not_allowed(
    edits: Sequence[Edit], allowed: tuple[type, ...]
) -> tuple[tuple[Edit, ...], tuple[Drop, ...]]:
    """Keeps the operations that a stage offers."""
    return partition(edits, "not_allowed", lambda edit: isinstance(edit, allowed))


def drop_excess(edits: Sequence[Edit], max_edits: int) -> tuple[tuple[Edit, ...], tuple[Drop, ...]]:
    """Keeps the first `max_edits` (K_ops in the paper)."""
    return tuple(edits[:max_edits]), tuple(("too_many", describe(edit)) for edit in edits[max_edits:])


def drop_repeats(
    edits: Sequence[Edit], entries: Mapping[str, str]
) -> tuple[tuple[Edit, ...], tuple[Drop, ...]]:
    """Keeps the edits whose text is new: neither in `entries` (id -> text) nor given by an earlier edit.

    A merge may keep the text of one that it merges. Case and punctuation make no difference.
    """
    given: set[str] = set()

    def is_new(edit: Edit) -> bool:
        if isinstance(edit, Remove):
            return True
        own = edit.ids if isinstance(edit, Merge) else ()
        text = _words(edit.principle)
        new = text not in given and all(text != _words(entries[name]) for name in entries if name not in own)
        given.add(text)
        return new

    return partition(edits, "repeat", is_new)


def drop_copies(
    edits: Sequence[Edit], problems: Sequence[str], run: int = 8
) -> tuple[tuple[Edit, ...], tuple[Drop, ...]]:
    """Keeps the principles that do not repeat a problem, lest the prompt learn the training set by heart.

    A problem is repeated by the whole of its text, by `run` of its words in a row, or by all of its numbers
    of two digits or more, if it has two of them. Texts of fewer than four words are too short to tell a
    quotation from chance.
    """

    def is_general(edit: Edit) -> bool:
        said = _words(getattr(edit, "principle", ""))
        return not any(_quotes(said, text, run) or _long_numbers(text) <= {*said} for text in texts)

    texts = {_words(text) for text in problems}
    return partition(edits, "copies_problem", is_general)


def _quotes(said: tuple[str, ...], text: tuple[str, ...], run: int) -> bool:
    length = min(run, len(text))
    runs = {said[i : i + length] for i in range(len(said) - length + 1)}
    return length >= 4 and any(text[i : i + length] in runs for i in range(len(text) - length + 1))


def _long_numbers(text: tuple[str, ...]) -> set[str]:
    """A problem's numbers of two digits or more; a set that nothing contains if there are fewer than two."""
    numbers = {word for word in text if word.isdigit() and len(word) > 1}
    return numbers if len(numbers) > 1 else {""}


def shorten(principle: str, max_words: int) -> str:
    """At most `max_words` words: cut after the last sentence that fits, else at the limit."""
    words = principle.split()
    if len(words) <= max_words:
        return principle
    for length in range(max_words, 3, -1):
        if words[length - 1][-1] in ".!?":
            return " ".join(words[:length])
    return " ".join(words[:max_words]).rstrip(",;:")


def shorten_edits(edits: Sequence[Edit], max_words: int) -> tuple[tuple[Edit, ...], int]:
    """The edits with their principles cut by `shorten`, and how many were cut."""
    short = tuple(
        edit
        if isinstance(edit, Remove)
        else dataclasses.replace(edit, principle=shorten(edit.principle, max_words))
        for edit in edits
    )
    return short, sum(before != after for before, after in zip(edits, short, strict=True))


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))
