"""Prose that is edited by search and replace: blocks in a reply, and the passages that a block can name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from espl_jax.evolution.edits import Drop

_MAX_CHARS = 100_000
_MAX_BLOCKS = 100


def marked_blocks(text: str) -> tuple[list[tuple[str, str]], list[Drop]]:
    """The (search, replace) pairs between the marks of a merge conflict, and what was left out and why."""
    blocks: list[tuple[str, str]] = []
    drops: list[Drop] = []
    search: list[str] | None = None
    replace: list[str] | None = None
    for line in text[-_MAX_CHARS:].replace("\r\n", "\n").split("\n"):  # other line ends are characters
        mark = line.strip()
        if re.fullmatch(r"<{5,9} ?SEARCH", mark):
            if search is not None:
                drops.append(("truncated", "\n".join(search)))
            search, replace = [], None
        elif search is None:
            continue
        elif replace is None and re.fullmatch(r"={5,9}", mark):
            replace = []
        elif replace is not None and re.fullmatch(r">{5,9} ?REPLACE", mark):
            blocks.append(("\n".join(search), "\n".join(replace)))
            search = replace = None
        else:
            (search if replace is None else replace).append(line)
    if search is not None:
        drops.append(("truncated", "\n".join(search)))
    drops.extend(("too_many", "\n".join(block)) for block in blocks[_MAX_BLOCKS:])
    return blocks[:_MAX_BLOCKS], drops


def last_fenced(text: str) -> str | None:
    """The last fenced block of a reply, or all of it where nothing is fenced; None for a fence left open."""
    parts = re.split(r"^[ \t]*```[^\n]*$", text[-_MAX_CHARS:], flags=re.MULTILINE)
    if len(parts) % 2 == 0:
        return None
    return (parts[-2] if len(parts) > 1 else text).strip()


def passages(text: str, most: int = 64) -> list[str]:
    """Lines of the prose and, within lines, sentences, that occur in it once: what a block may search for."""
    found = dict.fromkeys(piece for piece in _pieces(text) if piece and text.count(piece) == 1)
    return list(found)[:most]


def _pieces(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield line.strip()
        yield from (sentence.strip() for sentence in re.split(r"(?<=[.!?])\s+", line))
