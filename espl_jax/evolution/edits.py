"""Edits of a list of principles: read from a model's reply, checked, and applied.

In a reply an edit is a JSON object, `evidence` being optional:

    {"op": "add", "principle": ..., "evidence": ...}
    {"op": "modify", "id": "G0", "principle": ...}
    {"op": "merge", "ids": ["G0", "C1"], "principle": ...}
    {"op": "remove", "id": "G0"}

Principles of the prompt are G0, G1, ..., candidates for it C0, C1, ...
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from espl_jax.evolution.json_replies import begins_with_json, has_empty_list, json_lists
from espl_jax.types import SystemPrompt

REASONS = {
    "no_json": "the reply holds no edit at all",
    "truncated": "the reply ends inside the edit",
    "broken_json": "the edit cannot be read as JSON, even after repair",
    "not_an_edit": "a JSON object that is no add, modify, merge or remove",
    "no_principle": "an add, modify or merge without a principle in words",
    "wrong_ids": "a modify or remove that does not name one id, or a merge that does not name two",
    "unknown_id": "an id that is not in the list",
    "conflict": "an earlier edit touches the same id",
    "repeat": "the principle is in the list already",
    "copies_problem": "the principle repeats the text of a problem",
    "too_many": "more edits than one reply may propose",
    "not_allowed": "an operation that this stage does not offer",
}

Drop = tuple[str, str]
"""(a key of REASONS, what was dropped)."""


@dataclasses.dataclass(frozen=True)
class Add:
    """A new principle at the end of the list."""

    principle: str
    evidence: str = ""


@dataclasses.dataclass(frozen=True)
class Modify:
    """Another text for the principle `id`, in its place."""

    id: str
    principle: str
    evidence: str = ""


@dataclasses.dataclass(frozen=True)
class Merge:
    """One principle instead of two or more, in the place of the first of them in the list."""

    ids: tuple[str, ...]
    principle: str
    evidence: str = ""


@dataclasses.dataclass(frozen=True)
class Remove:
    """The principle `id` goes."""

    id: str
    evidence: str = ""


Edit = Add | Modify | Merge | Remove

_OPERATION_KEYS = ("op", "operation", "action", "type", "edit")
_PRINCIPLE_KEYS = ("principle", "new_principle", "text", "content", "rule", "experience")
_ID_KEYS = ("ids", "id", "principle_id", "principle_ids", "target", "targets", "merged_from", "modified_from")
_EVIDENCE_KEYS = ("evidence", "reason", "why", "rationale")


def edit_to_json(edit: Edit) -> dict[str, Any]:
    """The edit as plain JSON values, in the form that replies have."""
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(edit).items()}
    return {"op": type(edit).__name__.lower(), **{name: value for name, value in fields.items() if value}}


def parse_edits(text: str) -> tuple[tuple[Edit, ...], tuple[Drop, ...]]:
    """Reads the edits of a reply; never raises.

    Where a reply holds several JSON lists, the first with an edit counts if the reply begins with JSON, the
    last otherwise (a reasoning model drafts before it answers). A deliberate empty list gives no edit and no
    drop.

    Returns:
      (edits, drops): the edits in order, and (reason, what) for everything that looked like one but was none.
    """
    lists = [[_read_edit(*found) for found in found_list] for found_list in json_lists(text)]
    if not lists:
        return (), () if has_empty_list(text) else (("no_json", _excerpt(text)),)
    if not begins_with_json(text):
        lists.reverse()
    chosen = next((read for read in lists if any(not isinstance(item, tuple) for item in read)), lists[0])
    edits = tuple(item for item in chosen if not isinstance(item, tuple))
    return edits, tuple(item for item in chosen if isinstance(item, tuple))


def partition(
    edits: Sequence[Edit], reason: str, keep: Callable[[Edit], bool]
) -> tuple[tuple[Edit, ...], tuple[Drop, ...]]:
    """Splits edits into those to keep and, under `reason`, those to drop."""
    kept = [(edit, keep(edit)) for edit in edits]
    return (
        tuple(edit for edit, good in kept if good),
        tuple((reason, describe(edit)) for edit, good in kept if not good),
    )


def describe(edit: Edit) -> str:
    """A short line for drops and logs."""
    return _excerpt(str(edit_to_json(edit)))


def drop_unknown(edits: Sequence[Edit], known: Collection[str]) -> tuple[tuple[Edit, ...], tuple[Drop, ...]]:
    """Keeps the edits all of whose ids are known."""
    return partition(edits, "unknown_id", lambda edit: all(touched in known for touched in touched_ids(edit)))


def drop_conflicts(edits: Sequence[Edit]) -> tuple[tuple[Edit, ...], tuple[Drop, ...]]:
    """Keeps of several edits that touch the same id the first."""
    taken: set[str] = set()

    def is_first(edit: Edit) -> bool:
        ids = touched_ids(edit)
        free = taken.isdisjoint(ids)
        if free:
            taken.update(ids)
        return free

    return partition(edits, "conflict", is_first)


def touched_ids(edit: Edit) -> tuple[str, ...]:
    """The ids that an edit changes; none for an add."""
    return edit.ids if isinstance(edit, Merge) else () if isinstance(edit, Add) else (edit.id,)


def edit_entries(entries: Mapping[str, str], edits: Sequence[Edit]) -> tuple[str, ...]:
    """Applies edits to a list of principles with ids.

    All ids mean the list as it was given. Edits with an unknown id, and later ones that touch an id already
    touched, change nothing.

    Args:
      entries: id -> principle, in order.
      edits: as parsed.

    Returns:
      The resulting principles: those of `entries` in their order, then the added ones.
    """
    edits, _ = drop_conflicts(drop_unknown(edits, entries)[0])
    order = list(entries)
    result: dict[str, str | None] = dict(entries)
    for edit in edits:
        ids = sorted(touched_ids(edit), key=order.index)
        result.update(dict.fromkeys(ids[1:]))
        if ids:
            result[ids[0]] = None if isinstance(edit, Remove) else edit.principle
    kept = [text for text in result.values() if text is not None]
    return (*kept, *[edit.principle for edit in edits if isinstance(edit, Add)])


def numbered(principles: Sequence[str], letter: str = "G") -> dict[str, str]:
    """id -> principle: G0, G1, ... (or C0, C1, ... for candidates)."""
    return {f"{letter}{i}": principle for i, principle in enumerate(principles)}


def apply_edits(system_prompt: SystemPrompt, edits: Sequence[Edit]) -> SystemPrompt:
    """The prompt with its principles edited and numbered anew from G0; nothing else of it changes.

    Ids mean the principles before any edit. Edits with an unknown id, and later ones that touch an id already
    touched, change nothing.
    """
    principles = edit_entries(numbered(system_prompt.principles), edits)
    return dataclasses.replace(system_prompt, principles=principles)


def _read_edit(value: dict[str, Any] | None, text: str, problem: str) -> Edit | Drop:
    edit = _as_edit(value or {})
    return (problem or edit, _excerpt(text)) if isinstance(edit, str) else edit


def _as_edit(value: dict[str, Any]) -> Edit | str:
    """The edit that a JSON object is, or the reason why it is none."""
    fields = {str(key).strip().lower(): item for key, item in value.items()}
    principle = clean(_first(fields, _PRINCIPLE_KEYS))
    evidence = clean(_first(fields, _EVIDENCE_KEYS))
    ids = _read_ids(_first(fields, _ID_KEYS))
    operation = _first(fields, _OPERATION_KEYS)
    if operation is None and principle:
        operation = ("add", "modify", "merge")[min(len(ids), 2)]
    operation = str(operation).strip().lower()
    if operation not in ("add", "modify", "merge", "remove"):
        return "not_an_edit"
    if operation == "remove":
        return Remove(ids[0], evidence) if len(ids) == 1 else "wrong_ids"
    if not any(character.isalpha() for character in principle):
        return "no_principle"
    if operation == "add":
        return Add(principle, evidence)
    if operation == "modify":
        return Modify(ids[0], principle, evidence) if len(ids) == 1 else "wrong_ids"
    return Merge(ids, principle, evidence) if len(ids) >= 2 else "wrong_ids"


def _read_ids(value: Any) -> tuple[str, ...]:
    """Ids from "G0", "[g0]", 0, "G0, G1" or a list of such; a bare number means a principle of the prompt."""
    items = value if isinstance(value, list) else [value]
    named = " ".join(
        str(item) for item in items if isinstance(item, str | int) and not isinstance(item, bool)
    )
    found = re.findall(r"\b([GCgc]?)(\d{1,6})\b", named)
    return tuple(dict.fromkeys(f"{letter.upper() or 'G'}{int(number)}" for letter, number in found))


def clean(value: Any) -> str:
    """One line of text without control characters, lone surrogates or a leading number such as "G0."."""
    if not isinstance(value, str):
        value = " ".join(str(item) for item in value) if isinstance(value, list) else ""
    printable = (" " if unicodedata.category(character) in ("Cc", "Cs") else character for character in value)
    line = " ".join("".join(printable).split())
    return re.sub(r"^\[?[GC]\d+\]?[.:)]\s*", "", line)


def _first(fields: dict[str, Any], names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) not in (None, "")), None)


def _excerpt(text: str, length: int = 200) -> str:
    return clean(text[: 2 * length])[:length]
