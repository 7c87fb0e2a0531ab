"""The fields of an edit in a reply, by all names that models give them."""

OPERATION = ("op", "operation", "action", "type", "edit")
PRINCIPLE = ("principle", "new_principle", "text", "content", "rule", "experience")
IDS = ("ids", "id", "principle_id", "principle_ids", "target", "targets", "merged_from", "modified_from")
EVIDENCE = ("evidence", "reason", "why", "rationale")
REPLACE = ("replace", "replacement", "replace_with", "text")

SHORT = frozenset({*OPERATION, *IDS})
"""Names of fields that hold a word or ids, never a text with quotes in it."""

KNOWN = frozenset({*SHORT, *PRINCIPLE, *EVIDENCE, *REPLACE, "search", "edits"})


def same_meaning(name: str) -> frozenset[str]:
    """All names of the field that `name` is one of, its own included."""
    groups = (OPERATION, PRINCIPLE, IDS, EVIDENCE, REPLACE)
    return frozenset({name}.union(*(group for group in groups if name in group)))
