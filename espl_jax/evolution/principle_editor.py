"""Edits a list of principles by operations on its entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from espl_jax.evolution import formats
from espl_jax.evolution.drafts import Draft
from espl_jax.evolution.edits import (
    Add,
    Edit,
    Merge,
    Modify,
    Remove,
    Rewrite,
    drop_conflicts,
    drop_unknown,
    edit_entries,
    edit_to_json,
    numbered,
    touched_ids,
)
from espl_jax.evolution.guards import drop_excess, drop_too_large
from espl_jax.evolution.line_edits import items_grammar, parse_items
from espl_jax.evolution.reflection import Record
from espl_jax.types import Problem, SystemPrompt

MOST_ITEMS = 64
"""Principles that a rewrite may list where `max_principles` sets no limit."""


class PrincipleEditor:
    """Edits the principles; the prose before them stays."""

    def __init__(self, parent: SystemPrompt, record: Record, problems: Sequence[Problem]):
        self.parent, self.record, self.problems = parent, record, problems
        self.entries = numbered(parent.principles)

    def criticize(self, values: Sequence[Mapping[str, Any]]) -> tuple[Edit, ...]:
        """Adds and modifies; at most `max_edits` for each critique."""
        guards = self.record.guards
        shown = {"principles": show_principles(self.entries), "max_edits": guards.max_edits}
        replies = self._ask(
            "critique",
            "critique",
            [{**each, **shown} for each in values],
            ("add", "modify"),
            self.entries,
            guards.max_edits,
            min_edits=1,
        )
        proposed: list[Edit] = []
        for edits, _ in replies:
            known = self.record.kept(drop_unknown(edits, self.entries))
            proposed.extend(self.record.kept(drop_excess(known, guards.max_edits)))
        return self.record.presentable(proposed, self.problems, self.entries)

    def revise(self, proposed: Sequence[Edit]) -> Draft:
        """The adds stand as candidates C0, C1, ..., the modifies as suggestions.

        Candidates that the revision does not mention become principles. Where the revision holds no usable
        edit, the suggestions are applied as they are.
        """
        adds = [edit for edit in proposed if isinstance(edit, Add)]
        suggestions = [edit for edit in proposed if isinstance(edit, Modify)]
        candidates = numbered([edit.principle for edit in adds], "C")
        entries = self.entries | candidates
        values = {
            "principles": show_principles(self.entries),
            "candidates": show_principles(candidates),
            "suggestions": "\n".join(f"- {edit.id}: {edit.principle}" for edit in suggestions) or "(none)",
        }
        ((edits, nothing),) = self._ask(
            "revision", "revision", [values], ("modify", "merge"), entries, len(entries)
        )
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

    def reflect(self, problems: str) -> tuple[Draft, bool]:
        """All four operations, at most `max_edits` of them."""
        most = self.record.guards.max_edits
        values = {"principles": show_principles(self.entries), "problems": problems, "max_edits": most}
        operations = ("add", "modify", "merge", "remove")
        ((edits, _),) = self._ask(
            "reflection", "reflection", [values], operations, self.entries, most, min_edits=1
        )
        edits = self.record.kept(drop_excess(self.record.kept(drop_unknown(edits, self.entries)), most))
        return self._with(edits)

    def rewrite(self, problems: str) -> tuple[Draft, bool]:
        """A whole list of principles, each checked as an added one would be."""
        guards = self.record.guards
        most = guards.max_principles or MOST_ITEMS
        values = {
            "principles": show_principles(self.entries),
            "problems": problems,
            "max_principles": most,
            "max_words": guards.max_words,
        }
        text = self.record.text("rewrite", "rewrite", values, items_grammar(most))
        old = {*self.parent.principles}
        listed = [Add(item) for item in dict.fromkeys(parse_items(text))]
        if not listed:
            self.record.count("no_edit")
        new = self.record.presentable([add for add in listed if add.principle not in old], self.problems, {})
        kept = [add for add in listed if add.principle in old or add in new]

        def apply(some: Sequence[Edit]) -> SystemPrompt:
            return dataclasses.replace(self.parent, principles=edit_entries({}, some))

        kept = self.record.kept(drop_too_large(kept, apply, guards))
        edit = Rewrite(self.parent.text, tuple(add.principle for add in kept))
        return Draft(apply(kept), (edit_to_json(edit),), {}), bool(kept)

    def cross(self, values: Mapping[str, Any]) -> tuple[Draft, bool]:
        """Adds, modifies and removes, each with its evidence."""
        ((edits, _),) = self._ask(
            "crossover",
            "crossover",
            [values],
            ("add", "modify", "remove"),
            self.entries,
            len(self.entries) + 2,
            evidence=True,
        )
        return self._with(self.record.kept(drop_unknown(edits, self.entries)))

    def _with(self, edits: Sequence[Edit]) -> tuple[Draft, bool]:
        edits = self.record.kept(drop_conflicts(self.record.presentable(edits, self.problems, self.entries)))
        return self._draft(edits, {}, {}), bool(edits)

    def _ask(
        self,
        stage: str,
        template: str,
        values: Sequence[Mapping[str, Any]],
        operations: Sequence[str],
        entries: Mapping[str, str],
        max_edits: int,
        min_edits: int = 0,
        evidence: bool = False,
    ) -> list[tuple[tuple[Edit, ...], bool]]:
        record, ids = self.record, tuple(entries)
        form = formats.instructions(
            record.settings.format, operations, ids, nothing=not min_edits, evidence=evidence
        )
        shared = {"format": form, "max_words": record.guards.max_words}
        kinds = {"add": Add, "modify": Modify, "merge": Merge, "remove": Remove}
        grammar = None
        if record.constrained:
            grammar = formats.grammar(
                record.settings.format,
                operations,
                ids,
                max_edits=max_edits,
                min_edits=min_edits,
                evidence=evidence,
            )
        return record.edits(
            stage,
            template,
            [{**each, **shared} for each in values],
            grammar,
            tuple(kinds[name] for name in operations),
            formats.opening(record.settings.format, operations),
        )

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


def show_principles(entries: Mapping[str, str]) -> str:
    """One line for each principle with its id; `(none)` for an empty list."""
    return "\n".join(f"{name}. {principle}" for name, principle in entries.items()) or "(none)"
