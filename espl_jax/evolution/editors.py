"""How a prompt is edited: a list of principles by operations on its entries, prose by its passages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from espl_jax.evolution import formats
from espl_jax.evolution.edits import (
    Add,
    Edit,
    Merge,
    Modify,
    Remove,
    Replace,
    Rewrite,
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
from espl_jax.evolution.line_edits import items_grammar, parse_items
from espl_jax.evolution.prose import last_fenced, passages
from espl_jax.evolution.reflection import Record
from espl_jax.evolution.schemas import blocks_schema
from espl_jax.types import Problem, Schema, SystemPrompt

MOST_ITEMS = 64
"""Principles that a rewrite may list where `max_principles` sets no limit."""


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

    def criticize(self, values: Sequence[Mapping[str, Any]]) -> tuple[Edit, ...]:
        """Edits that critiques propose, one critique for each set of values (a problem, its attempts)."""
        ...

    def revise(self, proposed: Sequence[Edit]) -> Draft:
        """What one revision of all that was proposed makes of the parent."""
        ...

    def reflect(self, problems: str) -> tuple[Draft, bool]:
        """What one call for all problems makes of the parent, and whether it proposed a usable edit."""
        ...

    def rewrite(self, problems: str) -> tuple[Draft, bool]:
        """What a rewrite of the whole prompt makes of the parent, and whether there was a usable one."""
        ...

    def cross(self, values: Mapping[str, Any]) -> tuple[Draft, bool]:
        """What a crossover makes of the parent, and whether it proposed a usable edit."""
        ...


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


EDITORS: dict[str, type[PrincipleEditor] | type[ProseEditor]] = {
    "principles": PrincipleEditor,
    "prose": ProseEditor,
}

BLOCKS = (
    'Write one JSON object {"edits": [...]} and nothing else. Each edit is {"search": "...", "replace": '
    '"..."}: the "search" text stands in the instructions exactly once and is copied letter for letter, the '
    '"replace" text takes its place; an empty "search" appends the text.'
)
"""What tells a reflector how to write edits of prose in JSON."""


def sentences(text: str) -> list[str]:
    """The passages of prose that lines can name: sentences that occur once."""
    listed = passages(text)
    return [piece for piece in listed if not any(other != piece and other in piece for other in listed)]


def show_principles(entries: Mapping[str, str]) -> str:
    """One line for each principle with its id; `(none)` for an empty list."""
    return "\n".join(f"{name}. {principle}" for name, principle in entries.items()) or "(none)"


def _show_block(edit: Replace) -> str:
    return f"Search: {edit.search or '(the end)'}\nReplace: {edit.replace}"
