"""Mutation: the best prompt learns from its own rollouts in three stages (Zhang et al. 2026, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from espl_jax.evolution.edit_limits import drop_excess, drop_not_allowed
from espl_jax.evolution.edits import (
    Add,
    Edit,
    Merge,
    Modify,
    clean,
    drop_conflicts,
    drop_unknown,
    edit_entries,
    edit_to_json,
    numbered,
    parse_edits,
)
from espl_jax.evolution.ratings import mutation_rating
from espl_jax.evolution.reflection import (
    Offspring,
    Record,
    fit,
    presentable,
    show_principles,
    verdict,
)
from espl_jax.evolution.templates import load_template
from espl_jax.types import Reflect, Rollouts, SystemPrompt


def mutate(
    parent: SystemPrompt,
    rollouts: Rollouts,
    reflect: Reflect,
    *,
    max_edits: int = 2,
    max_words: int = 32,
    max_principles: int | None = None,
    mutation_sigma: float = 1.0,
    opening: bool = True,
) -> Offspring:
    """A child of the iteration's best prompt.

    Three stages, each one batched call of `reflect`: (a) a summary of every rollout on the problems whose
    rewards are mixed (largest > smallest, copies of the prompt pooled); (b) for each such problem a critique
    that proposes edits; (c) one revision of the whole list, in which the proposed adds stand as candidates
    C0, C1, ... and the proposed modifies are suggestions. Candidates that the revision does not mention
    become principles. Where the revision holds no edit that can be used, the critiques' own are applied.

    Args:
      parent: rank 1 of this iteration, with its rating *after* the iteration's game.
      rollouts: the iteration's; the parent must be among its prompts.
      reflect: conversations in, replies out.
      max_edits: K_ops, how many edits one critique may propose.
      max_words: of each new principle; longer ones are cut.
      max_principles: new principles beyond so many in all are left out; None for no limit.
      mutation_sigma: Delta sigma, what the child's uncertainty grows by.
      opening: write the beginning of every reply for the model.

    Returns:
      The child, or None with one of the reasons `no_mixed_problem`, `no_edits`, `unchanged`. Without a mixed
      problem `reflect` is not called.

    Raises:
      ValueError: the parent has no rollouts, or `reflect` gave a wrong number of replies.
    """
    slots = rollouts.slots().get(parent.id)
    if slots is None:
        raise ValueError(f"parent {parent.id!r} has no rollouts: only {list(rollouts.slots())} have any")
    record = Record(reflect)
    rewards = rollouts.rewards[slots]
    mixed = [int(b) for b in np.flatnonzero(rewards.max(axis=(0, 2)) > rewards.min(axis=(0, 2)))]
    if not mixed:
        return record.offspring(None, "no_mixed_problem")

    principles = numbered(parent.principles)
    attempts = _summarize(rollouts, slots, mixed, record, opening)
    proposed = _criticize(rollouts, mixed, attempts, principles, max_edits, max_words, record, opening)
    adds = [edit for edit in proposed if isinstance(edit, Add)]
    suggestions = [edit for edit in proposed if isinstance(edit, Modify)]
    if not proposed:
        return record.offspring(None, "no_edits")
    candidates = numbered([edit.principle for edit in adds], "C")
    problems = [problem.text for problem in rollouts.problems]
    revision, usable = _revise(principles, candidates, suggestions, problems, max_words, record, opening)
    if not usable:
        record.count("revision_unusable")
        revision = record.kept(drop_conflicts(suggestions))

    entries = principles | candidates
    revised, cut = fit(parent, edit_entries(entries, revision), max_principles, record)
    if revised == parent.principles:
        return record.offspring(None, "unchanged")
    mu, sigma = mutation_rating(parent, mutation_sigma)
    added = [{**edit_to_json(edit), "id": name} for name, edit in zip(candidates, adds, strict=True)]
    child = SystemPrompt(
        text=parent.text,
        principles=revised,
        mu=mu,
        sigma=sigma,
        parents=(parent.id,),
        operator="mutation",
        edits=(*added, *map(edit_to_json, revision), *cut),
        evidence={
            "problems": [rollouts.problems[b].id for b in mixed],
            "suggestions": [edit_to_json(edit) for edit in suggestions],
            "revision_unusable": not usable,
        },
    )
    return record.offspring(child)


def _summarize(
    rollouts: Rollouts, slots: Sequence[int], mixed: Sequence[int], record: Record, opening: bool
) -> list[list[str]]:
    """Stage (a): for each mixed problem one line for each of its rollouts, verdict and summary."""
    template = load_template("summary")
    places = [(i, b, j) for b in mixed for i in slots for j in range(rollouts.rewards.shape[2])]
    conversations = [
        template.conversation(
            opening=opening,
            problem=rollouts.problems[b].text,
            answer=rollouts.problems[b].answer,
            attempt=rollouts.replies[i][b][j] or "(nothing)",
            taken=rollouts.answers[i][b][j] or "(none found)",
            verdict=verdict(rollouts, i, b, j),
        )
        for i, b, j in places
    ]
    lines: dict[int, list[str]] = {b: [] for b in mixed}
    for (i, b, j), reply in zip(places, record.ask("summary", conversations), strict=True):
        summary = clean(reply).removeprefix("Summary:").strip() or "(no summary)"
        lines[b].append(f"- {verdict(rollouts, i, b, j)}: {summary}")
    return [lines[b] for b in mixed]


def _criticize(
    rollouts: Rollouts,
    mixed: Sequence[int],
    attempts: Sequence[Sequence[str]],
    principles: Mapping[str, str],
    max_edits: int,
    max_words: int,
    record: Record,
    opening: bool,
) -> tuple[Edit, ...]:
    """Stage (b): for each mixed problem a critique; the adds and modifies that all of them propose."""
    template = load_template("critique")
    conversations = [
        template.conversation(
            opening=opening,
            problem=rollouts.problems[b].text,
            answer=rollouts.problems[b].answer,
            attempts="\n".join(lines),
            principles=show_principles(principles),
            max_edits=max_edits,
            max_words=max_words,
        )
        for b, lines in zip(mixed, attempts, strict=True)
    ]
    proposed: list[Edit] = []
    for reply in record.ask("critique", conversations):
        edits = record.kept(parse_edits(reply))
        edits = record.kept(drop_not_allowed(edits, (Add, Modify)))
        edits = record.kept(drop_unknown(edits, principles))
        proposed.extend(record.kept(drop_excess(edits, max_edits)))
    problems = [problem.text for problem in rollouts.problems]
    return presentable(proposed, principles, problems, max_words, record)


def _revise(
    principles: Mapping[str, str],
    candidates: Mapping[str, str],
    suggestions: Sequence[Modify],
    problems: Sequence[str],
    max_words: int,
    record: Record,
    opening: bool,
) -> tuple[tuple[Edit, ...], bool]:
    """Stage (c): the revision's edits of principles and candidates, and whether the reply was of use.

    A deliberate empty list is of use: every candidate stays as it is, no suggestion is taken up.
    """
    conversation = load_template("revision").conversation(
        opening=opening,
        principles=show_principles(principles),
        candidates=show_principles(candidates),
        suggestions="\n".join(f"- {edit.id}: {edit.principle}" for edit in suggestions) or "(none)",
        max_words=max_words,
    )
    (reply,) = record.ask("revision", [conversation])
    parsed = parse_edits(reply)
    entries = {**principles, **candidates}
    edits = record.kept(drop_not_allowed(record.kept(parsed), (Modify, Merge)))
    edits = record.kept(drop_unknown(edits, entries))
    edits = record.kept(drop_conflicts(presentable(edits, entries, problems, max_words, record)))
    return edits, bool(edits) or parsed == ((), ())
