"""Gold answers with answers that a competition grader accepts, and answers that it does not, from pairs.txt.

In the file, `## ` begins a category, a line without a mark is a gold answer, and below it `=` marks what is
accepted and `!` what is not. Hard cases stay in, whether the grader gets them right or not; those that it
gets wrong are in known_errors.txt, as `gold | answer`.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent


def _read_pairs():
    pairs, category, gold = {}, [], ""
    for line in (_FOLDER / "pairs.txt").read_text(encoding="utf-8").splitlines():
        mark, _, text = line.strip().partition(" ")
        if mark == "##":
            category = pairs.setdefault(text, [])
        elif mark in ("=", "!") and line.startswith(" "):
            category.append((gold, text, mark == "="))
        elif line:
            gold = line
    return pairs


def _read_errors():
    lines = (_FOLDER / "known_errors.txt").read_text(encoding="utf-8").splitlines()
    return {tuple(line.split(" | ")) for line in lines if line}


PAIRS = _read_pairs()
"""By category: (gold, answer, whether it is right)."""

KNOWN_ERRORS = _read_errors()
"""(gold, answer) of those that are graded wrong."""
