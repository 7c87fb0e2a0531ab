"""How a prompt is edited: a list of principles by operations on its entries, prose by search and replace."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from espl_jax.evolution.edits import (
    Add,
    Edit,
    Merge,
    Modify,
    Remove,
    Replace,
    apply_edits,
    describe,
    drop_conflicts,
    drop_unknown,
    edit_entries,
    edit_to_json,
    numbered,
    touched_ids,
    why_not_replaced,
)
from espl_jax.evolution.guards import drop_excess, drop_too_large
from espl_jax.evolution.prose import passages
from espl_jax.evolution.reflection import Record
from espl_jax.evolution.schemas import blocks_schema, edits_schema
from espl_jax.types import Problem, Schema, SystemPrompt

CHARS_PER_WORD = 8
"""How long a principle may be in a reply kept to a schema: so many characters for each of its words."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """An edited prompt.

    Attributes:
      prompt: the parent with its new text or principles.
      edits: what made it, for `replay_edits`.
      evidence: what the operator went by.
    """

    prompt: SystemPrompt
    edits: tuple[dict[str, Any], ...]
    evidence: dict[str, Any]


class Editor(Protocol):
    """Edits one parent with the help of a reflector, through `Record`, which asks and counts."""

    def show(self) -> str:
        """The parent as reflection sees it, with what edits refer to."""
        ...

    def criticize(self, values: Sequence[Mapping[str, Any]]) -> tuple[Edit, ...]:
        """Edits that critiques propose, one for each set of values (a problem, its attempts)."""
        ...

    def revise(self, proposed: Sequence[Edit]) -> Draft:
        """What one revision of all that was proposed makes of the parent."""
        ...

    def cross(self, values: Mapping[str, Any]) -> tuple[Draft, bool]:
        """What a crossover makes of the parent, and whether it proposed an edit that can be used."""
        ...


class PrincipleEditor:
    """Edits the principles; the prose before them stays."""

    def __init__(self, parent: SystemPrompt, record: Record, problems: Sequence[Problem]):
        self.parent, self.record, self.problems = parent, record, problems
        self.entries = numbered(parent.principles)

    def show(self) -> str:
        """One line for each principle with its id."""
        return show_principles(self.entries)

    def criticize(self, values: Sequence[Mapping[str, Any]]) -> tuple[Edit, ...]:
        """Adds and modifies; at most `max_edits` for each critique."""
        limits = {"max_edits": self.record.guards.max_edits, "max_words": self.record.guards.max_words}
        replies = self.record.edits(
            "critique",
            "critique",
            [{**each, "principles": self.show(), **limits} for each in values],
            self._schema(("add", "modify"), self.entries, self.record.guards.max_edits, min_edits=1),
            (Add, Modify),
        )
        proposed: list[Edit] = []
        for edits, _ in replies:
            known = self.record.kept(drop_unknown(edits, self.entries))
            proposed.extend(self.record.kept(drop_excess(known, self.record.guards.max_edits)))
        return self.record.presentable(proposed, self.problems, self.entries)

    def revise(self, proposed: Sequence[Edit]) -> Draft:
        """The adds stand as candidates C0, C1, ..., the modifies as suggestions.

        Candidates that the revision does not mention become principles. Where the revision holds no edit that
        can be used, the suggestions are applied as they are.
        """
        adds = [edit for edit in proposed if isinstance(edit, Add)]
        suggestions = [edit for edit in proposed if isinstance(edit, Modify)]
        candidates = numbered([edit.principle for edit in adds], "C")
        entries = self.entries | candidates
        values = {
            "principles": self.show(),
            "candidates": show_principles(candidates),
            "suggestions": "\n".join(f"- {edit.id}: {edit.principle}" for edit in suggestions) or "(none)",
            "max_words": self.record.guards.max_words,
        }
        schema = self._schema(("modify", "merge"), entries, len(entries))
        ((edits, nothing),) = self.record.edits("revision", "revision", [values], schema, (Modify, Merge))
        edits = self.record.kept(drop_unknown(edits, entries))
        edits = self.record.kept(drop_conflicts(self.record.presentable(edits, self.problems, entries)))
        usable = bool(edits) or nothing
        if not usable:
            self.record.count("revision_unusable")
            edits = self.record.kept(drop_conflicts(suggestions))
        evidence = {
            "suggestions": [edit_to_json(edit) for edit in suggestions],
            "revision_unusable": not usable,
        }
        return self._draft(edits, dict(zip(candidates, adds, strict=True)), evidence)

    def cross(self, values: Mapping[str, Any]) -> tuple[Draft, bool]:
        """Adds, modifies and removes, each with its evidence."""
        schema = self._schema(("add", "modify", "remove"), self.entries, len(self.entries) + 2, evidence=True)
        values = {**values, "max_words": self.record.guards.max_words}
        replies = self.record.edits("crossover", "crossover", [values], schema, (Add, Modify, Remove))
        edits = self.record.kept(drop_unknown(replies[0][0], self.entries))
        edits = self.record.kept(drop_conflicts(self.record.presentable(edits, self.problems, self.entries)))
        return self._draft(edits, {}, {}), bool(edits)

    def _draft(self, edits: Sequence[Edit], candidates: Mapping[str, Add], evidence: dict[str, Any]) -> Draft:
        """The prompt after all edits that its limits allow, and the candidates that these leave."""
        left: dict[Edit, str] = {}

        def used(kept: Sequence[Edit]) -> dict[str, Add]:
            named = {left.get(edit) for edit in kept} | {n for edit in kept for n in touched_ids(edit)}
            return {name: add for name, add in candidates.items() if name in named}

        def others(kept: Sequence[Edit]) -> list[Edit]:
            return [edit for edit in kept if edit not in left]

        def apply(kept: Sequence[Edit]) -> SystemPrompt:
            entries = self.entries | {name: add.principle for name, add in used(kept).items()}
            return dataclasses.replace(self.parent, principles=edit_entries(entries, others(kept)))

        kept = self.record.kept(drop_too_large(edits, apply, self.record.guards))
        taken = {name for edit in kept for name in touched_ids(edit)}
        left.update({add: name for name, add in candidates.items() if name not in taken})
        kept = self.record.kept(drop_too_large([*kept, *left], apply, self.record.guards))
        added = [{**edit_to_json(add), "id": name} for name, add in used(kept).items()]
        return Draft(apply(kept), (*added, *map(edit_to_json, others(kept))), evidence)

    def _schema(
        self, operations: Sequence[str], ids: Mapping[str, str], max_edits: int, **options: Any
    ) -> Schema | None:
        guards = self.record.guards
        if not self.record.constrained:
            return None
        return edits_schema(
            operations,
            tuple(ids),
            max_reply_tokens=guards.max_reply_tokens,
            max_edits=max_edits,
            max_chars=CHARS_PER_WORD * guards.max_words,
            **options,
        )


class ProseEditor:
    """Edits the text by blocks, each applied exactly or dropped; principles stay."""

    def __init__(self, parent: SystemPrompt, record: Record, problems: Sequence[Problem]):
        self.parent, self.record, self.problems = parent, record, problems

    def show(self) -> str:
        """The text as it is."""
        return self.parent.text or "(empty)"

    def criticize(self, values: Sequence[Mapping[str, Any]]) -> tuple[Edit, ...]:
        """Blocks; at most `max_edits` for each critique."""
        most = self.record.guards.max_edits
        values = [{**each, "instructions": self.show(), "max_edits": most} for each in values]
        schema = self._schema(most, min_edits=1)
        replies = self.record.edits("critique", "critique_prose", values, schema, (Replace,))
        proposed: list[Edit] = []
        for edits, _ in replies:
            proposed.extend(self.record.kept(drop_excess(self._that_apply(edits), most)))
        return self.record.presentable(list(dict.fromkeys(proposed)), self.problems, {})

    def revise(self, proposed: Sequence[Edit]) -> Draft:
        """The blocks proposed are suggestions; where the revision holds no block that can be used, they are
        applied one after another as far as they apply.
        """
        blocks = tuple(edit for edit in proposed if isinstance(edit, Replace))
        suggestions = "\n\n".join(map(_show_block, blocks))
        values = {"instructions": self.show(), "suggestions": suggestions}
        schema = self._schema(max(len(blocks), 1))
        ((edits, nothing),) = self.record.edits("revision", "revision_prose", [values], schema, (Replace,))
        edits = self.record.presentable(self._that_apply(edits), self.problems, {})
        usable = bool(edits) or nothing
        if not usable:
            self.record.count("revision_unusable")
            edits = blocks
        evidence = {
            "suggestions": [edit_to_json(edit) for edit in blocks],
            "revision_unusable": not usable,
        }
        return self._draft(edits, evidence)

    def cross(self, values: Mapping[str, Any]) -> tuple[Draft, bool]:
        """Blocks, each with its evidence."""
        most = self.record.guards.max_edits + 2
        schema = self._schema(most, evidence=True)
        ((edits, _),) = self.record.edits("crossover", "crossover_prose", [values], schema, (Replace,))
        edits = self.record.presentable(self._that_apply(edits), self.problems, {})
        return self._draft(edits, {}), bool(edits)

    def _that_apply(self, edits: Sequence[Replace]) -> tuple[Replace, ...]:
        reasons = [(edit, why_not_replaced(self.parent.text, edit)) for edit in edits]
        drops = [(reason, describe(edit)) for edit, reason in reasons if reason]
        return self.record.kept(([edit for edit, reason in reasons if not reason], drops))

    def _draft(self, edits: Sequence[Replace], evidence: dict[str, Any]) -> Draft:
        """The text after all blocks that still apply after those before them, and that its limits allow."""

        prompt, kept, drops = self.parent, [], []
        for edit in edits:
            after = apply_edits(prompt, [edit])
            guards = self.record.guards
            reason = why_not_replaced(prompt.text, edit) or guards.why_too_large(after, prompt)
            if not reason and guards.copies(after.text) and not guards.copies(prompt.text):
                reason = "copies_problem"  # a part of it was there, or in an earlier block
            if reason:
                drops.append((reason, describe(edit)))
            else:
                prompt = after
                kept.append(edit)
        self.record.kept((kept, drops))
        return Draft(prompt, tuple(map(edit_to_json, kept)), evidence)

    def _schema(self, max_edits: int, **options: Any) -> Schema | None:
        guards = self.record.guards
        if not self.record.constrained:
            return None
        return blocks_schema(
            passages(self.parent.text),
            max_reply_tokens=guards.max_reply_tokens,
            max_edits=max_edits,
            max_chars=CHARS_PER_WORD * guards.max_words,
            **options,
        )


EDITORS: dict[str, type[PrincipleEditor] | type[ProseEditor]] = {
    "principles": PrincipleEditor,
    "prose": ProseEditor,
}


def show_principles(entries: Mapping[str, str]) -> str:
    """One line for each principle with its id; `(none)` for an empty list."""
    return "\n".join(f"{name}. {principle}" for name, principle in entries.items()) or "(none)"


def _show_block(edit: Replace) -> str:
    return f"Search: {edit.search or '(the end)'}\nReplace: {edit.replace}"
