"""Reads the edits of a model's reply, whatever it wrote around and between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from espl_jax.evolution import edit_fields
from espl_jax.evolution.edit_text import clean, ids_in, printable, says_nothing
from espl_jax.evolution.edits import Add, Drop, Edit, Merge, Modify, Remove, Replace, excerpt
from espl_jax.evolution.json_replies import begins_with_json, has_empty_list, json_lists
from espl_jax.evolution.prose import marked_blocks

_LIST_OPERATIONS = ("add", "modify", "merge", "remove")


def parse_edits(text: str) -> tuple[tuple[Edit, ...], tuple[Drop, ...]]:
    """Reads the edits of a reply; never raises.

    Where a reply holds several JSON lists, the first with an edit counts if the reply begins with JSON, the
    last otherwise (a reasoning model drafts before it answers). A deliberate empty list gives no edit and no
    drop.

    Returns:
      (edits, drops): the edits in order, and (reason, what) for everything that looked like one but was none.
    """
    blocks, left_out = marked_blocks(text)
    left_out = [(reason, excerpt(what)) for reason, what in left_out]
    if blocks:
        return _split([*[_edit_or_drop(_block(*block), "\n".join(block)) for block in blocks], *left_out])
    lists = [[_read_edit(*found) for found in found_list] for found_list in json_lists(text)]
    if not lists and left_out:
        return (), tuple(left_out)
    if not lists:
        return (), () if has_empty_list(text) else (("no_edit", excerpt(text)),)
    if not begins_with_json(text):
        lists.reverse()
    chosen = next((read for read in lists if any(not isinstance(item, tuple) for item in read)), lists[0])
    return _split(chosen)


def _split(read: Sequence[Edit | Drop]) -> tuple[tuple[Edit, ...], tuple[Drop, ...]]:
    edits = tuple(item for item in read if not isinstance(item, tuple))
    return edits, tuple(item for item in read if isinstance(item, tuple))


def _read_edit(value: dict[str, Any] | None, text: str, problem: str) -> Edit | Drop:
    edit = _as_edit(value or {}, is_cut=bool(problem))
    return _edit_or_drop((problem or edit) if isinstance(edit, str) else edit, text)


def _edit_or_drop(edit: Edit | str, text: str) -> Edit | Drop:
    return (edit, excerpt(text)) if isinstance(edit, str) else edit


def _as_edit(value: dict[str, Any], is_cut: bool) -> Edit | str:
    """The edit that a JSON object is, or the reason why it is none. Of one that was cut, no operation is
    inferred: what tells it may be missing."""
    fields = {str(key).strip().lower(): item for key, item in value.items()}
    principle = clean(_first(fields, edit_fields.PRINCIPLE))
    evidence = clean(_first(fields, edit_fields.EVIDENCE))
    ids = ids_in(_first(fields, edit_fields.IDS))
    operation = _first(fields, edit_fields.OPERATION)
    if operation is None and principle and "search" not in fields and not is_cut:
        operation = ("add", "modify", "merge")[min(len(ids), 2)]
    operation = operation.strip().lower() if isinstance(operation, str) else ""
    if "search" in fields and operation not in _LIST_OPERATIONS:
        # Both texts have to be there: without the second the passage would be deleted.
        replace = next((fields[name] for name in edit_fields.REPLACE if name in fields), None)
        return _block(fields["search"], replace, evidence)
    if operation not in _LIST_OPERATIONS:
        return "not_an_edit"
    if operation == "remove":
        return Remove(ids[0], evidence) if len(ids) == 1 else "wrong_ids"
    if says_nothing(principle):
        return "no_principle"
    if operation == "add":
        return Add(principle, evidence)
    if operation == "modify":
        return Modify(ids[0], principle, evidence) if len(ids) == 1 else "wrong_ids"
    return Merge(ids, principle, evidence) if len(ids) >= 2 else "wrong_ids"


def _block(search: Any, replace: Any, evidence: str = "") -> Replace | str:
    """A block of prose, or the reason why it is none. Its texts are kept as they are written."""
    if not (isinstance(search, str) and isinstance(replace, str)):
        return "not_an_edit"
    search, replace = (printable(text, keep="\n\t") for text in (search, replace))
    if not (search or any(character.isalpha() for character in replace)):
        return "no_principle"
    return Replace(search, replace, evidence)


def _first(fields: dict[str, Any], names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) not in (None, "")), None)
