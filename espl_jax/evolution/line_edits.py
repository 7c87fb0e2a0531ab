r"""Edits written as lines: the grammar that keeps a reply to them, and the reader of whatever a model wrote.

    ADD: Write the answer as \boxed{...}.
    CHANGE G2: Check each step before the next one.
    MERGE C0 C1: Write down every step and check it.
    REMOVE G1: It is about one task only.
    BECAUSE: Set B won two tasks with it.

Each edit takes one line, and a line `BECAUSE:` after it gives its evidence. `NONE` means that nothing needs
an edit. Nothing is escaped, so LaTeX survives. In prose, S0, S1, ... number the passages that can be changed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from espl_jax.evolution.edit_text import clean, ids_in, says_nothing
from espl_jax.evolution.edits import Add, Drop, Edit, Merge, Modify, Remove, excerpt
from espl_jax.evolution.schemas import MANY_IDS, MERGED_IDS

KEYWORDS = {"add": "ADD", "modify": "CHANGE", "merge": "MERGE", "remove": "REMOVE"}
"""Operation -> how its line begins."""

NOTHING = "NONE"
"""The reply that asks for no edit."""

_SYNONYMS = {
    "ADD": "add",
    "NEW": "add",
    "CHANGE": "modify",
    "MODIFY": "modify",
    "REWRITE": "modify",
    "UPDATE": "modify",
    "MERGE": "merge",
    "COMBINE": "merge",
    "REMOVE": "remove",
    "DELETE": "remove",
    "BECAUSE": "because",
    "EVIDENCE": "because",
}
_MAX_CHARS = 100_000
_MAX_LINE = 10_000
_MARKS = " \t>*-•·#`_"
_NUMBERING = re.compile(r"^\d{1,3}[.)]\s+")
_LINE = re.compile(rf"({'|'.join(_SYNONYMS)})\b([^:：]{{0,80}})[:：]\s*(.*)", re.IGNORECASE)
_BARE = re.compile(r"(REMOVE|DELETE)\s+(\[?[GCS]\d+\]?)\.?\s*()", re.IGNORECASE)
_PLAIN = re.compile(r"(ADD)( )(.+)")
# What stands between the keyword and the colon: ids and the words that join them.
_HEAD = re.compile(
    r"(?:[\s,;&+()\[\]*`_]|[GCS]\d{1,6}\b|\b(?:and|with|to|the|a|new|principle|rule|id|line)s?\b)*", re.I
)
# A letter, perhaps behind a mark, and then whatever one line can hold, another letter included; but no number
# such as "G0.".
_CHARS = r"\p{Cc}\p{Zl}\p{Zp}"
_TEXT = rf'TEXT: /[\\$"(]?\p{{L}}(\p{{L}}|[^{_CHARS}\p{{Nd}}][^{_CHARS}]*\p{{L}})[^{_CHARS}]*/'
_QUOTES = {'"': '"', "'": "'", "“": "”", "`": "`"}


def lines_grammar(
    operations: Sequence[str],
    ids: Sequence[str],
    *,
    max_edits: int,
    min_edits: int = 0,
    evidence: bool = False,
) -> str:
    """Returns a grammar of replies in lines, as llguidance reads Lark.

    A line has no longest length: a text that does not end before the reply's limit is cut off by it, and the
    reply is dropped, which is better than half a sentence in a prompt.

    Args:
      operations: keys of `KEYWORDS`; those that need an id are left out where there is none.
      ids: of what edits may name.
      max_edits, min_edits: of a reply; with 0 it may be `NONE`.
      evidence: whether a line `BECAUSE:` follows each edit.

    Raises:
      ValueError: no operation is possible.
    """
    because = ' "\\nBECAUSE: " TEXT' if evidence else ""
    rules = {"add": f'"ADD: " TEXT{because}'}
    if ids:
        rules |= {"modify": f'"CHANGE " ID ": " TEXT{because}', "remove": '"REMOVE " ID ": " TEXT'}
    if len(ids) > 1:
        rules["merge"] = f'"MERGE " ({_merged(ids)}) ": " TEXT{because}'
    possible = [name for name in dict.fromkeys(operations) if name in rules]
    if not possible:
        raise ValueError(f"operations={tuple(operations)}: none is possible with ids={tuple(ids)}")
    named = "\n".join(f"{name}: {rules[name]}" for name in possible)
    listed = " | ".join(f'"{name}"' for name in ids)
    more = f' ("\\n" edit){{0,{max_edits - 1}}}' if max_edits > 1 else ""
    nothing = "" if min_edits else f' | "{NOTHING}"'
    return "\n".join(
        [
            f"start: edit{more}{nothing}",
            f"edit: {' | '.join(possible)}",
            named,
            *([f"ID: {listed}"] if ids and possible != ["add"] else []),
            _TEXT,
        ]
    )


def _merged(ids: Sequence[str]) -> str:
    """Two ids or more, the first of them once (see `schemas.MANY_IDS`)."""
    more = f"{{1,{MERGED_IDS - 1}}}"
    if len(ids) > MANY_IDS:
        return f'ID (" " ID){more}'
    others = {first: " | ".join(f'" {name}"' for name in ids if name != first) for first in ids}
    return " | ".join(f'"{first}" ({rest}){more}' for first, rest in others.items())


def items_grammar(max_items: int) -> str:
    """Returns the grammar of a whole list: one principle a line, each after a dash."""
    more = f' ("\\n" item){{0,{max_items - 1}}}' if max_items > 1 else ""
    return f'start: item{more}\nitem: "- " TEXT\n{_TEXT}'


def parse_lines(text: str) -> tuple[tuple[Edit, ...], tuple[Drop, ...]] | None:
    """Reads the edits of a reply in lines; never raises.

    Bullets, numbers, bold marks and quotes around an edit make no difference, nor does text between edits.

    Returns:
      (edits, drops), the edits in order; None if no line looks like an edit. A reply that says `NONE` has
      neither.
    """
    edits: list[Edit] = []
    drops: list[Drop] = []
    found = False
    for line in text[-_MAX_CHARS:].splitlines():
        line = _bare(line[:_MAX_LINE])
        if line.rstrip(".").upper() == NOTHING:
            found = True
        match = _LINE.match(line) or _BARE.fullmatch(line) or _PLAIN.match(line)
        if match is None:
            continue
        keyword, head, said = match.groups()
        operation = _SYNONYMS[keyword.upper()]
        if not _HEAD.fullmatch(head):
            if not (plain := _PLAIN.match(line)):
                continue  # a sentence that begins with the word
            operation, head, said = "add", "", plain[3]
        found = True
        said = _unquoted(clean(said.strip("*_ \t")))
        if operation == "because":
            if edits and not edits[-1].evidence:
                edits[-1] = type(edits[-1])(**{**vars(edits[-1]), "evidence": said})
            continue
        read = _edit(operation, ids_in(head), said)
        if isinstance(read, str):
            drops.append((read, excerpt(line)))
        else:
            edits.append(read)
    return (tuple(edits), tuple(drops)) if found else None


def parse_items(text: str) -> tuple[str, ...]:
    """Reads a whole list of principles: its lines after dashes, bullets or numbers; else none."""
    items = []
    for line in text[-_MAX_CHARS:].splitlines():
        line = line[:_MAX_LINE].strip()
        match = re.match(r"(?:[-*•]|\d{1,3}[.)]|\[?[GC]\d+\]?[.:)])\s+(.*)", line)
        if match and any(map(str.isalpha, item := _unquoted(clean(match[1])))):
            items.append(item)
    return tuple(items)


def _edit(operation: str, ids: tuple[str, ...], said: str) -> Edit | str:
    """The edit, or why it is none."""
    if operation == "remove":
        return Remove(ids[0], said) if len(ids) == 1 else "wrong_ids"
    if says_nothing(said):
        return "no_principle"
    if operation == "add":
        return Add(said)
    if operation == "modify":
        return Modify(ids[0], said) if len(ids) == 1 else "wrong_ids"
    return Merge(ids, said) if len(ids) >= 2 else "wrong_ids"


def _bare(line: str) -> str:
    """The line without the marks around it."""
    line = _NUMBERING.sub("", line.lstrip(_MARKS), count=1).lstrip(_MARKS).rstrip()
    return line.rstrip("`") if line.count("`") % 2 else line


def _unquoted(text: str) -> str:
    """The text without quotes that enclose all of it."""
    inner = text[1:-1]
    if len(text) > 2 and text[-1] == _QUOTES.get(text[0]) and text[0] not in inner and text[-1] not in inner:
        return inner.strip()
    return text
