"""JSON schemas of edits, such that every complete reply under one is read by `parse_edits` without a drop.

The object is `{"edits": [...]}` in the strict form that OpenAI-compatible servers want: every property is
required, and no others are allowed. Keys are listed in the order in which they are to be written. Texts have
no longest length: one that does not end before the reply's limit is cut off, and the reply is dropped.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from espl_jax.types import Schema

OPERATIONS = ("add", "modify", "merge", "remove")

MERGED_IDS = 4
"""Most ids in a merge."""

MANY_IDS = 64
"""With more ids than this, a merge may name one twice: the schema would grow with their square."""

# Control characters, line ends and everything beyond the basic plane are left out.
_NO_DIGIT = r" !#-/:-\[\]-~"
_LETTERS = (
    r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0391-\u03a1\u03a3-\u03f5\u0400-\u0481\u048a-\u052f"
    r"\u05d0-\u05ea\u0620-\u064a\u0904-\u0939\u0e01-\u0e30\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"
)
_ANY = r' !#-\[\]-~"\\\u00a1-\u2027\u2030-\ud7ff\uf900-\ufffd'


def edits_schema(
    operations: Sequence[str],
    ids: Sequence[str],
    *,
    max_edits: int,
    min_edits: int = 0,
    evidence: bool = False,
) -> Schema:
    """Returns the schema of edits of a list of principles.

    A merge names two to four ids of which the first differs from the others (up to `MANY_IDS` of them). A
    principle begins with a letter and no number such as "G0.", which `parse_edits` would take off.

    Args:
      operations: of `OPERATIONS`; those that no id allows are left out.
      ids: of the principles that edits may name.
      max_edits, min_edits: of a reply.
      evidence: whether every edit ends with its evidence.

    Raises:
      ValueError: an operation is unknown, or none is possible.
    """
    if unknown := set(operations) - set(OPERATIONS):
        raise ValueError(f"operations {sorted(unknown)} are unknown; choose from {OPERATIONS}")
    ids = list(dict.fromkeys(ids))

    def named(operation: str) -> Schema | None:
        if operation == "merge":
            return {"ids": _merged_ids(ids)} if len(ids) > 1 else None
        if operation == "add":
            return {}
        return {"id": _one_of(ids)} if ids else None

    possible = {op: fields for op in operations if (fields := named(op)) is not None}
    if not possible:
        raise ValueError(f"operations={tuple(operations)}: none is possible with ids={tuple(ids)}")
    items = [
        _object(
            {"op": _one_of([op]), **fields}
            | ({} if op == "remove" else {"principle": _text()})
            | ({"evidence": _text()} if evidence else {})
        )
        for op, fields in possible.items()
    ]
    return _edits(items, max_edits, min_edits)


def blocks_schema(
    searches: Sequence[str], *, max_edits: int, min_edits: int = 0, evidence: bool = False
) -> Schema:
    """Returns the schema of edits of prose: a passage and its replacement; an empty passage appends the text.

    Args:
      searches: the passages that may be replaced; those with a control character are left out.
      max_edits, min_edits, evidence: see `edits_schema`.
    """
    # What is appended has to be words; a passage may be replaced by anything, or by nothing.
    last = {"evidence": _text()} if evidence else {}
    end = _object({"search": _one_of([""]), "replace": _text(), **last})
    passages = sorted({text for text in searches if text and _printable(text)}, key=len)
    inside = [_object({"search": _one_of(passages), "replace": _text(anything=True), **last})]
    return _edits([*(inside if passages else []), end], max_edits, min_edits)


def relaxed(schema: Schema) -> Schema:
    """Returns the same structure for servers: enumerations and item counts stay, patterns go.

    The strict mode of some servers takes only a part of JSON schema. A merge may then name an id twice, which
    `parse_edits` drops.
    """
    if "anyOf" in schema:
        choices = [relaxed(choice) for choice in schema["anyOf"]]
        return _any_of([choice for i, choice in enumerate(choices) if choice not in choices[:i]])
    kept = {name: value for name, value in schema.items() if name not in ("pattern", "prefixItems")}
    if "properties" in schema:
        kept["properties"] = {name: relaxed(inner) for name, inner in schema["properties"].items()}
    if "items" in schema:
        kept["items"] = relaxed(schema["items"])
    for first in schema.get("prefixItems", ()):
        kept["items"] = _one_of(sorted({*first["enum"], *kept["items"]["enum"]}))
    return kept


def _printable(text: str) -> bool:
    # Tabs and similar characters are written with a backslash, which readers of LaTeX misread.
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def _edits(items: list[Schema], max_edits: int, min_edits: int) -> Schema:
    edits = {"type": "array", "items": _any_of(items), "minItems": min_edits, "maxItems": max_edits}
    return _object({"edits": edits})


def _text(anything: bool = False) -> Schema:
    """A string of one line; it begins with a letter and has another one, unless `anything` will do."""
    letter = f"[{_LETTERS}]"
    beginning = "" if anything else f"{letter}({letter}|[{_LETTERS}{_NO_DIGIT}][{_ANY}]*{letter})"
    return {"type": "string", "pattern": f"^{beginning}[{_ANY}]*$"}


def _merged_ids(ids: Sequence[str]) -> Schema:
    if len(ids) > MANY_IDS:
        return {"type": "array", "items": _one_of(ids), "minItems": 2, "maxItems": MERGED_IDS}
    return _any_of([_merged(first, [name for name in ids if name != first]) for first in ids])


def _merged(first: str, others: Sequence[str]) -> Schema:
    return {
        "type": "array",
        "prefixItems": [_one_of([first])],
        "items": _one_of(others),
        "minItems": 2,
        "maxItems": min(MERGED_IDS, len(others) + 1),
    }


def _one_of(values: Sequence[str]) -> Schema:
    return {"type": "string", "enum": list(values)}


def _any_of(schemas: Sequence[Schema]) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def _object(properties: dict[str, Schema]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
