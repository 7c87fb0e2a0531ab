"""Edits prose by its passages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from espl_jax.evolution import formats
from espl_jax.evolution.drafts import Draft
from espl_jax.evolution.edits import (
    Add,
    Edit,
    Modify,
    Remove,
    Replace,
    Rewrite,
    apply_edits,
    describe,
    drop_conflicts,
    drop_unknown,
    edit_to_json,
    numbered,
    why_not_replaced,
)
from espl_jax.evolution.guards import drop_excess
from espl_jax.evolution.prose import last_fenced, passages
from espl_jax.evolution.reflection import Record
from espl_jax.evolution.schemas import blocks_schema
from espl_jax.types import Problem, Schema, SystemPrompt

BLOCKS = (
    'Write one JSON object {"edits": [...]} and nothing else. Each edit is {"search": "...", "replace": '
    '"..."}: the "search" text stands in the instructions exactly once and is copied letter for letter, the '
    '"replace" text takes its place; an empty "search" appends the text.'
)
"""What tells a reflector how to write edits of prose in JSON."""


class ProseEditor:
    """Edits the text by passages, each edit applied exactly or dropped; principles stay.

    In JSON an edit names the passage that it replaces; in lines, passages are shown with numbers S0, S1, ...
    """

    def __init__(self, parent: SystemPrompt, record: Record, problems: Sequence[Problem]):
        self.parent, self.record, self.problems = parent, record, problems
        self.in_lines = record.settings.format == "lines"
        self.entries = numbered(sentences(parent.text), "S")

    def show(self) -> str:
        """The text itself, or its passages with numbers."""
        if self.in_lines:
            return "\n".join(f"{name}. {passage}" for name, passage in self.entries.items()) or "(empty)"
        return self.parent.text or "(empty)"

    def criticize(self, values: Sequence[Mapping[str, Any]]) -> tuple[Edit, ...]:
        """Blocks that can be applied to the text; at most `max_edits` for each critique."""
        most = self.record.guards.max_edits
        shown = {"instructions": self.show(), "max_edits": most}
        replies = self._ask("critique", "critique_prose", [{**each, **shown} for each in values], most, 1)
        proposed: list[Edit] = []
        for edits, _ in replies:
            known = self._that_apply(edits)
            proposed.extend(self.record.kept(drop_excess(known, most)))
        return self.record.presentable(proposed, self.problems, {})

    def revise(self, proposed: Sequence[Edit]) -> Draft:
        """Blocks that take up what was proposed; without a usable one, what was proposed is applied."""
        suggestions = "\n\n".join(_show_block(edit) for edit in proposed if isinstance(edit, Replace))
        values = {"instructions": self.show(), "suggestions": suggestions}
        ((edits, nothing),) = self._ask("revision", "revision_prose", [values], max(len(proposed), 1))
        edits = self.record.presentable(self._that_apply(edits), self.problems, {})
        usable = bool(edits) or nothing
        if not usable:
            self.record.count("revision_unusable")
            edits = tuple(proposed)
        evidence = {
            "suggestions": [edit_to_json(edit) for edit in proposed],
            "revision_unusable": not usable,
        }
        return self._draft(edits, evidence)

    def reflect(self, problems: str) -> tuple[Draft, bool]:
        """At most `max_edits` blocks."""
        most = self.record.guards.max_edits
        values = {"instructions": self.show(), "problems": problems, "max_edits": most}
        ((edits, _),) = self._ask("reflection", "reflection_prose", [values], most, 1)
        kept = self.record.kept(drop_excess(self._that_apply(edits), most))
        edits = self.record.presentable(kept, self.problems, {})
        return self._draft(edits, {}), bool(edits)

    def rewrite(self, problems: str) -> tuple[Draft, bool]:
        """A whole text: the last closed fence of the reply, or all of it where there is no fence."""
        values = {"instructions": self.parent.text or "(empty)", "problems": problems}
        text = last_fenced(self.record.text("rewrite", "rewrite_prose", values)) or ""
        if not text:
            self.record.count("no_edit")
        kept = self.record.presentable([Replace("", text)] if text else [], self.problems, {})
        draft = dataclasses.replace(self.parent, text=text) if kept else self.parent
        if reason := self.record.guards.why_too_large(draft, self.parent):
            self.record.kept(((), [(reason, describe(kept[0]))]))
            draft, kept = self.parent, ()
        edit = Rewrite(draft.text, draft.principles)
        return Draft(draft, (edit_to_json(edit),), {}), bool(kept)

    def cross(self, values: Mapping[str, Any]) -> tuple[Draft, bool]:
        """Blocks, each with its evidence."""
        most = self.record.guards.max_edits + 2
        ((edits, _),) = self._ask("crossover", "crossover_prose", [values], most, evidence=True)
        edits = self.record.presentable(self._that_apply(edits), self.problems, {})
        return self._draft(edits, {}), bool(edits)

    def _ask(
        self,
        stage: str,
        template: str,
        values: Sequence[Mapping[str, Any]],
        max_edits: int,
        min_edits: int = 0,
        evidence: bool = False,
    ) -> list[tuple[tuple[Edit, ...], bool]]:
        record, operations, ids = self.record, ("add", "modify", "remove"), tuple(self.entries)
        if not self.in_lines:
            schema: Schema | None = None
            if record.constrained:
                schema = blocks_schema(
                    passages(self.parent.text), max_edits=max_edits, min_edits=min_edits, evidence=evidence
                )
            shared = {"format": BLOCKS}
            return record.edits(
                stage,
                template,
                [{**each, **shared} for each in values],
                schema,
                (Replace,),
                '```json\n{"edits": [{"search": "',
            )
        form = formats.instructions(
            "lines", operations, ids, what="sentence", nothing=not min_edits, evidence=evidence
        )
        grammar = None
        if record.constrained:
            grammar = formats.grammar(
                "lines", operations, ids, max_edits=max_edits, min_edits=min_edits, evidence=evidence
            )
        replies = record.edits(
            stage,
            template,
            [{**each, "format": form} for each in values],
            grammar,
            (Add, Modify, Remove, Replace),
            formats.opening("lines", operations),
        )
        return [(self._as_blocks(edits), nothing) for edits, nothing in replies]

    def _as_blocks(self, edits: Sequence[Edit]) -> tuple[Edit, ...]:
        """Edits of numbered passages as replacements of their texts."""
        blocks: list[Edit] = []
        known = self.record.kept(drop_unknown(edits, self.entries))
        for edit in self.record.kept(drop_conflicts(known)):
            match edit:
                case Add(principle, evidence):
                    blocks.append(Replace("", principle, evidence))
                case Modify(name, principle, evidence):
                    blocks.append(Replace(self.entries[name], principle, evidence))
                case Remove(name, evidence):
                    blocks.append(Replace(self.entries[name], "", evidence))
                case Replace():
                    blocks.append(edit)
        return tuple(blocks)

    def _that_apply(self, edits: Sequence[Edit]) -> tuple[Edit, ...]:
        blocks = [edit for edit in edits if isinstance(edit, Replace)]
        reasons = [(edit, why_not_replaced(self.parent.text, edit)) for edit in blocks]
        drops = [(reason, describe(edit)) for edit, reason in reasons if reason]
        return self.record.kept(([edit for edit, reason in reasons if not reason], drops))

    def _draft(self, edits: Sequence[Edit], evidence: dict[str, Any]) -> Draft:
        """The text after all blocks that still apply after those before them, and that its limits allow."""
        prompt, kept, drops = self.parent, [], []
        for edit in edits:
            assert isinstance(edit, Replace)  # prose is edited by nothing else
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


def sentences(text: str) -> list[str]:
    """The passages of prose that lines can name: sentences that occur once."""
    listed = passages(text)
    return [piece for piece in listed if not any(other != piece and other in piece for other in listed)]


def _show_block(edit: Replace) -> str:
    return f"Search: {edit.search or '(the end)'}\nReplace: {edit.replace}"
