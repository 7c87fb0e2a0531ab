"""How edits are written in replies, as lines or as JSON: instructions, grammars and readers."""

from __future__ import annotations

from collections.abc import Sequence

from espl_jax.evolution.edit_replies import parse_edits
from espl_jax.evolution.edits import Drop, Edit, excerpt
from espl_jax.evolution.line_edits import KEYWORDS, NOTHING, lines_grammar, parse_lines
from espl_jax.evolution.schemas import edits_schema
from espl_jax.types import Grammar

_LINES = {
    "add": "ADD: [the new {what}]",
    "modify": "CHANGE {first}: [the new text of {first}]",
    "merge": "MERGE {first} {second}: [one {what} that replaces both]",
    "remove": "REMOVE {first}: [why]",
}
_OBJECTS = {
    "add": '{{"op": "add", "principle": "..."}}',
    "modify": '{{"op": "modify", "id": "{first}", "principle": "..."}}',
    "merge": '{{"op": "merge", "ids": ["{first}", "{second}"], "principle": "..."}}',
    "remove": '{{"op": "remove", "id": "{first}"}}',
}


def instructions(
    name: str,
    operations: Sequence[str],
    ids: Sequence[str],
    *,
    what: str = "principle",
    nothing: bool = False,
    evidence: bool = False,
) -> str:
    """Returns what tells a reflector how to write edits, for the placeholder `$format`.

    Args:
      name: `lines` or `json`.
      operations: keys of `line_edits.KEYWORDS`; those that need an id are left out where there is none.
      ids: of what edits may name.
      what: what is added.
      nothing: whether there may be no edit.
      evidence: whether each edit has its evidence.
    """
    needed = {"add": 0, "modify": 1, "remove": 1, "merge": 2}
    known = {"what": what, "first": next(iter(ids), ""), "second": next(iter(ids[1:]), "")}
    forms = _LINES if name == "lines" else _OBJECTS
    listed = [forms[each].format(**known) for each in operations if len(ids) >= needed[each]]
    if name == "lines":
        form = "this form" if len(listed) == 1 else "one of these forms"
        said = [f"Write one edit on each line, in {form}, and nothing else:", *listed]
        if evidence:
            said.append("After each edit write a line BECAUSE: [what speaks for the edit].")
        if nothing:
            said.append(f"Write {NOTHING} if nothing needs an edit.")
        return "\n".join(said)
    form = "this form" if len(listed) == 1 else "one of these forms"
    said = [f'Write one JSON object {{"edits": [...]}} and nothing else. Each edit has {form}:', *listed]
    if evidence:
        said.append('Each edit has a field "evidence" too: what speaks for it.')
    if nothing:
        said.append('Write {"edits": []} if nothing needs an edit.')
    return "\n".join(said)


def grammar(
    name: str,
    operations: Sequence[str],
    ids: Sequence[str],
    *,
    max_edits: int,
    min_edits: int = 0,
    evidence: bool = False,
) -> Grammar:
    """Returns what replies are kept to; see `lines_grammar` and `edits_schema`."""
    make = lines_grammar if name == "lines" else edits_schema
    return make(operations, ids, max_edits=max_edits, min_edits=min_edits, evidence=evidence)


def opening(name: str, operations: Sequence[str]) -> str:
    """Returns how a reply begins, for models that would not begin so by themselves."""
    if name == "lines":
        return f"{KEYWORDS[operations[0]]}{':' if operations[0] == 'add' else ''}"
    return '```json\n{"edits": [{"op": "' + (
        f'{operations[0]}", "principle": "' if operations[0] == "add" else ""
    )


def read(name: str, text: str) -> tuple[tuple[Edit, ...], tuple[Drop, ...]]:
    """Returns (edits, drops) of a reply in this format, or in the other if there are none in this one."""
    in_lines = parse_lines(text)
    if name == "lines" and in_lines is not None:
        return in_lines
    in_json = parse_edits(text)
    if in_json[0] or in_lines is None:
        return in_json
    nothing_found = all(reason == "no_edit" for reason, _ in in_json[1]) and in_json[1]
    return in_lines if nothing_found else in_json


def cut_off(text: str) -> tuple[tuple[Edit, ...], tuple[Drop, ...]]:
    """Returns what is read of a reply that did not end by itself: no edit, and one drop."""
    return (), (("truncated", excerpt(text)),)
