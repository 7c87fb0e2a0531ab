"""Edits of a system prompt: what they are, how they are written, and how they are applied.

In a reply an edit is a JSON object, `evidence` being optional:

    {"op": "add", "principle": ..., "evidence": ...}
    {"op": "modify", "id": "G0", "principle": ...}
    {"op": "merge", "ids": ["G0", "C1"], "principle": ...}
    {"op": "remove", "id": "G0"}
    {"search": ..., "replace": ...}

Principles of the prompt are G0, G1, ..., candidates for it C0, C1, ... The last is for prose; it may also be
written between the marks of a merge conflict:

    <<<<<<< SEARCH
    ...
    =======
    ...
    >>>>>>> REPLACE
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from espl_jax.types import SystemPrompt

REASONS = {
    "no_edit": "the reply holds no edit at all",
    "truncated": "the edit, or the whole reply, was cut off",
    "broken_json": "the edit cannot be read as JSON, even after repair",
    "unclear_end": "broken JSON in which a text may end at more than one quote",
    "not_an_edit": "a JSON object that is no add, modify, merge, remove or block of prose",
    "no_principle": "an add, modify or merge without a principle in words",
    "wrong_ids": "a modify or remove that does not name one id, or a merge that does not name two",
    "unknown_id": "an id that is not in the list",
    "conflict": "an earlier edit touches the same id",
    "not_found": "the text to be replaced is not in the prompt",
    "ambiguous": "the text to be replaced is in the prompt more than once",
    "no_change": "a block whose two texts are the same",
    "repeat": "the principle is in the list already",
    "too_long": "the principle has too many words",
    "copies_problem": "the edit repeats the text of a problem",
    "copies_answer": "the edit gives the answer to a problem",
    "copies_template": "the edit echoes what the reflector was told",
    "copies_member": "another prompt has the principle already",
    "too_many": "more edits than one reply may propose",
    "not_allowed": "an operation that this stage does not offer",
    "no_room": "the prompt would have too many principles",
    "over_budget": "the prompt would have too many tokens",
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


@dataclasses.dataclass(frozen=True)
class Replace:
    """Another text for a passage of the prose; an empty `search` appends a paragraph."""

    search: str
    replace: str
    evidence: str = ""


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """Another prompt in the place of the whole one."""

    text: str
    principles: tuple[str, ...]


Edit = Add | Modify | Merge | Remove | Replace
"""What a reflector can propose; a `Rewrite` is recorded of a child and not proposed in parts."""


def edit_to_json(edit: Edit | Rewrite) -> dict[str, Any]:
    """The edit as plain JSON values, in the form that replies have, with its `op` always."""
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(edit).items()}
    always = ("search", "replace", "text", "principles")
    kept = {name: value for name, value in fields.items() if value or name in always}
    return {"op": type(edit).__name__.lower(), **kept}


def edit_from_json(value: Mapping[str, Any]) -> Edit:
    """The edit that `edit_to_json` wrote. Raises ValueError for anything else."""
    fields = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
    kinds: dict[object, Callable[..., Edit]] = {
        kind.__name__.lower(): kind for kind in (Add, Modify, Merge, Remove, Replace)
    }
    try:
        return kinds[fields.pop("op", None)](**fields)
    except (KeyError, TypeError):
        raise ValueError(f"{dict(value)} is no edit as `edit_to_json` writes them") from None


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
    """A short line for drops and logs, in the words of `line_edits`."""
    match edit:
        case Add(principle):
            line = f"ADD: {principle}"
        case Modify(name, principle):
            line = f"CHANGE {name}: {principle}"
        case Merge(names, principle):
            line = f"MERGE {' '.join(names)}: {principle}"
        case Remove(name):
            line = f"REMOVE {name}"
        case Replace(search, replace):
            line = f"REPLACE {search!r}: {replace}" if search else f"ADD: {replace}"
    return excerpt(line)


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
    """The ids that an edit changes; none for an add or a block of prose."""
    return edit.ids if isinstance(edit, Merge) else () if isinstance(edit, Add | Replace) else (edit.id,)


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
        if ids and not isinstance(edit, Replace):
            result[ids[0]] = None if isinstance(edit, Remove) else edit.principle
    kept = [text for text in result.values() if text is not None]
    return (*kept, *[edit.principle for edit in edits if isinstance(edit, Add)])


def numbered(principles: Sequence[str], letter: str = "G") -> dict[str, str]:
    """id -> principle: G0, G1, ... (or C0, C1, ... for candidates)."""
    return {f"{letter}{i}": principle for i, principle in enumerate(principles)}


def apply_edits(system_prompt: SystemPrompt, edits: Sequence[Edit]) -> SystemPrompt:
    """The prompt with its principles edited and numbered anew from G0, and its prose by blocks, in order.

    Ids mean the principles before any edit. Edits with an unknown id, later ones that touch an id already
    touched, and blocks whose text is not found exactly once, change nothing.
    """
    principles = edit_entries(numbered(system_prompt.principles), edits)
    text = system_prompt.text
    for edit in edits:
        if isinstance(edit, Replace) and not why_not_replaced(text, edit):
            text = replace_once(text, edit)
    return dataclasses.replace(system_prompt, text=text, principles=principles)


def replay_edits(system_prompt: SystemPrompt, record: Sequence[Mapping[str, Any]]) -> SystemPrompt:
    """The prompt after the edits that a child's `edits` record, applied to its parent.

    An add that has an id (C0, C1, ...) is a candidate, which later edits of the record may change.

    Raises:
      ValueError: the record holds something else than edits.
    """
    if len(record) == 1 and record[0].get("op") == "rewrite":
        whole = record[0]
        return dataclasses.replace(system_prompt, text=whole["text"], principles=tuple(whole["principles"]))
    added = [item for item in record if item.get("op") == "add" and "id" in item]
    candidates = {item["id"]: item["principle"] for item in added}
    edits = [edit_from_json(item) for item in record if item not in added]
    principles = edit_entries(numbered(system_prompt.principles) | candidates, edits)
    blocks = [edit for edit in edits if isinstance(edit, Replace)]
    return dataclasses.replace(apply_edits(system_prompt, blocks), principles=principles)


def why_not_replaced(text: str, block: Replace) -> str:
    """The reason why a block cannot be applied to this text, or nothing."""
    if block.search == block.replace:
        return "no_change"
    times = text.count(block.search) if block.search else 1
    return ("not_found", "")[times] if times < 2 else "ambiguous"


def replace_once(text: str, block: Replace) -> str:
    """The text with the block's passage replaced, white space at its ends aside."""
    if not block.search:
        return f"{text}\n\n{block.replace}".strip()
    return text.replace(block.search, block.replace).strip()


def excerpt(text: str, length: int = 200) -> str:
    """The beginning of a text, on one line, for drops and logs."""
    return " ".join(text[: 2 * length].split())[:length]
