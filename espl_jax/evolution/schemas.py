r"""JSON schemas of edits, such that every reply under one is read by `parse_edits` without a drop.

The object is `{"edits": [...]}`, in the strict form that OpenAI-compatible servers want: every property is
required, others are not allowed. Keys stand in the order in which they are to be written.

A reply must also fit: one of at most `max_reply_tokens` bytes has at most as many tokens, whatever the
tokenizer. Strings are therefore bounded in bytes. A text of at most n characters is either ASCII with up to
n // 8 others (`"`, `\` and what is not ASCII), or it is 2 * n // 5 characters of any kind; no character takes
more than three bytes of UTF-8 between JSON's quotes. Control characters, line ends and all that lies beyond
the basic plane are left out.
"""

from __future__ import annotations

import bisect
import json
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from espl_jax.types import Schema

USEFUL_CHARS = 24
"""A reply that has no room for a text of so many characters is refused."""

SHORT_CHARS = 100
"""Texts get shorter than this only where a reply has a single edit, or as few as it must."""

MERGED_IDS = 4
"""Most ids in a merge."""

MANY_IDS = 64
"""With more ids than so many, a merge may name one twice: the schema would grow with their square."""

OPERATIONS = ("add", "modify", "merge", "remove")

# Character classes, without their brackets. The last is all of the basic plane that one would print.
_ASCII = r" !#-\[\]-~"
_OTHERS = r'"\\\u00a1-\u2027\u2030-\ud7ff\uf900-\ufffd'
_NO_DIGIT = r" !#-/:-\[\]-~"
_LETTERS = (
    r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0391-\u03a1\u03a3-\u03f5\u0400-\u0481\u048a-\u052f"
    r"\u05d0-\u05ea\u0620-\u064a\u0904-\u0939\u0e01-\u0e30\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"
)


def edits_schema(
    operations: Sequence[str],
    ids: Sequence[str],
    *,
    max_reply_tokens: int,
    max_edits: int,
    min_edits: int = 0,
    max_chars: int,
    evidence: bool = False,
) -> Schema:
    """Edits of a list of principles.

    A merge names two to four ids of which the first differs from the others (up to `MANY_IDS` of them). A
    principle begins with a letter and no number such as "G0.", which `parse_edits` would take off.

    Args:
      operations: of `OPERATIONS`; those that no id allows are left out.
      ids: of the principles that edits may name.
      max_reply_tokens: of a reply; if need be its edits are fewer than `max_edits`, or its texts shorter.
      max_edits, min_edits: of a reply.
      max_chars: of a principle, and of its evidence; no less than `USEFUL_CHARS`.
      evidence: whether every edit ends with its evidence.

    Raises:
      ValueError: not even the fewest edits fit with a text of any use; an operation is unknown, or none is
        possible.
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

    def items(chars: int) -> Schema:
        text = _text(chars)
        return _any_of(
            [
                _object(
                    {"op": _one_of([op]), **fields}
                    | ({} if op == "remove" else {"principle": text})
                    | ({"evidence": text} if evidence else {})
                )
                for op, fields in possible.items()
            ]
        )

    return _fitted(items, max_reply_tokens, max_edits, min_edits, max_chars)


def blocks_schema(
    searches: Sequence[str],
    *,
    max_reply_tokens: int,
    max_edits: int,
    min_edits: int = 0,
    max_chars: int,
    evidence: bool = False,
) -> Schema:
    """Edits of prose: a passage and what takes its place; an empty passage puts the text at the end.

    A passage that is longer than `max_chars` or holds a control character is left out, and so are the longest
    ones if replies would have no room for them.

    Args:
      searches: the passages that may be replaced; the empty one need not be among them.
      max_reply_tokens, max_edits, min_edits, evidence: see `edits_schema`.
      max_chars: of a text, and of its evidence.

    Raises:
      ValueError: not even the fewest edits fit with a text of any use.
    """

    def items(chars: int) -> Schema:
        # What is put at the end has to be words; what takes a passage's place may be anything, and nothing.
        last = {"evidence": _text(chars)} if evidence else {}
        end = _object({"search": _one_of([""]), "replace": _text(chars), **last})
        inside = {"search": _one_of(passages), "replace": _text(chars, anything=True), **last}
        return _any_of([_object(inside), end] if passages else [end])

    passages = sorted(
        {text for text in searches if text and len(text) <= max_chars and _printable(text)}, key=len
    )
    while True:
        try:
            return _fitted(items, max_reply_tokens, max_edits, min_edits, max_chars)
        except ValueError:
            if not passages:
                raise
            passages.pop()


def relaxed(schema: Schema) -> Schema:
    """The same structure for servers: enumerations and numbers of items stay, patterns and lengths go.

    The strict mode of some servers takes only a part of JSON schema, and length is bounded by their tokens. A
    merge may then name an id twice, which `parse_edits` drops.
    """
    if "anyOf" in schema:
        choices = [relaxed(choice) for choice in schema["anyOf"]]
        return _any_of([choice for i, choice in enumerate(choices) if choice not in choices[:i]])
    kept = {
        name: value for name, value in schema.items() if name not in ("pattern", "maxLength", "prefixItems")
    }
    if "properties" in schema:
        kept["properties"] = {name: relaxed(inner) for name, inner in schema["properties"].items()}
    if "items" in schema:
        kept["items"] = relaxed(schema["items"])
    for first in schema.get("prefixItems", ()):
        kept["items"] = _one_of(sorted({*first["enum"], *kept["items"]["enum"]}))
    return kept


def most_bytes(schema: Schema) -> int:
    """Most bytes of a reply under a schema, written as `json.dumps(..., ensure_ascii=False)` writes it.

    That is, with one space after each comma and colon, and escaped no more than JSON demands: what
    `text.constrained` keeps a model to. Strings without an enumeration are those of this module.
    """
    if "anyOf" in schema:
        return max(map(most_bytes, schema["anyOf"]))
    if "enum" in schema:
        return max(_written(value) for value in schema["enum"])
    match schema["type"]:
        case "object":
            fields = [_written(name) + 2 + most_bytes(inner) for name, inner in schema["properties"].items()]
        case "array":
            first = [most_bytes(inner) for inner in schema.get("prefixItems", ())]
            fields = first + [most_bytes(schema["items"])] * (schema["maxItems"] - len(first))
        case _:
            chars = schema["maxLength"]
            return 2 + max(chars + 2 * (chars // 8), 3 * (2 * chars // 5))
    return 2 + sum(fields) + 2 * max(len(fields) - 1, 0)


def _written(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode())


def _printable(text: str) -> bool:
    # Tabs and the like are written with a backslash, which readers of LaTeX take for another.
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def _fitted(
    items: Callable[[int], Schema], max_reply_tokens: int, max_edits: int, min_edits: int, max_chars: int
) -> Schema:
    """As many edits as have room for texts of `SHORT_CHARS`, at most `max_edits`; then the longest texts."""
    fewest, max_chars = max(min_edits, 1), max(max_chars, USEFUL_CHARS)

    def schema(count: int, chars: int) -> Schema:
        edits = {"type": "array", "items": items(chars), "minItems": min_edits, "maxItems": count}
        return _object({"edits": edits})

    def most(limit: int, size: Callable[[int], int]) -> int:
        """The largest number up to a limit whose size still fits; -1 for none."""
        return bisect.bisect(range(limit + 1), max_reply_tokens, key=size) - 1

    short = min(max_chars, SHORT_CHARS)
    count = max(fewest, most(max_edits, lambda count: most_bytes(schema(count, short))))
    chars = most(max_chars, lambda chars: most_bytes(schema(count, chars)))
    if chars < USEFUL_CHARS:
        least = most_bytes(schema(fewest, USEFUL_CHARS))
        raise ValueError(
            f"reflection.max_new_tokens={max_reply_tokens}: a reply may take {least} tokens, with just "
            f"{fewest} edit{'s' * (fewest > 1)} of {USEFUL_CHARS} characters; raise it to {least} at least"
        )
    return schema(count, chars)


def _text(chars: int, anything: bool = False) -> Schema:
    """A string of at most `chars` characters; it begins with a letter unless `anything` will do."""
    some, any_ = chars // 8, 2 * chars // 5
    rest = f"[{_ASCII}]*(?:[{_OTHERS}][{_ASCII}]*){{0,{some}}}"
    if anything:
        pattern = f"^(?:{rest}|[{_ASCII}{_OTHERS}]{{0,{any_}}})$"
    else:
        more = f"[{_ASCII}{_OTHERS}]{{0,{max(any_ - 2, 0)}}}"
        pattern = f"^(?:[A-Za-z][{_NO_DIGIT}]{rest}|[{_LETTERS}][{_LETTERS}{_NO_DIGIT}]{more})$"
    return {"type": "string", "pattern": pattern, "maxLength": chars}


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
