"""Mutation: the best prompt learns from its own rollouts in three stages (Zhang et al. 2026, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from espl_jax.evolution.edit_replies import clean
from espl_jax.evolution.editors import EDITORS
from espl_jax.evolution.guards import Guards
from espl_jax.evolution.ratings import mutation_rating
from espl_jax.evolution.reflection import Offspring, Record, Unanswered, verdict
from espl_jax.types import Reflect, Rollouts, SystemPrompt


def mutate(
    parent: SystemPrompt,
    rollouts: Rollouts,
    reflect: Reflect,
    *,
    form: str = "principles",
    guards: Guards | None = None,
    mutation_sigma: float = 1.0,
    opening: bool = True,
    constrained: bool = True,
) -> Offspring:
    """A child of the iteration's best prompt.

    Three stages, each one batched call of `reflect`: (a) a summary of every rollout on the problems whose
    rewards are mixed (largest > smallest, copies of the prompt pooled); (b) for each such problem a critique
    that proposes edits; (c) one revision of all that was proposed, see `PrincipleEditor` and `ProseEditor`.

    Args:
      parent: rank 1 of this iteration, with its rating *after* the iteration's game.
      rollouts: the iteration's; the parent must be among its prompts.
      reflect: conversations in, replies out.
      form: `principles` edits the list, `prose` the text by search and replace.
      guards: what is accepted; `Guards()` by default.
      mutation_sigma: Delta sigma, what the child's uncertainty grows by.
      opening: write the beginning of every reply for the model.
      constrained: have edits kept to their schema where the reflector can, see `KeepsSchemas`.

    Returns:
      The child, or None with one of the reasons `no_mixed_problem`, `no_edits`, `unchanged`, `no_replies`
      (the reflector answered no conversation of a stage). Without a mixed problem `reflect` is not called.

    Raises:
      ValueError: the parent has no rollouts, or `reflect` gave a wrong number of replies.
    """
    slots = rollouts.slots().get(parent.id)
    if slots is None:
        raise ValueError(f"parent {parent.id!r} has no rollouts: only {list(rollouts.slots())} have any")
    record = Record(reflect, guards or Guards(), opening, constrained)
    rewards = rollouts.rewards[slots]
    mixed = [int(b) for b in np.flatnonzero(rewards.max(axis=(0, 2)) > rewards.min(axis=(0, 2)))]
    if not mixed:
        return record.offspring(None, "no_mixed_problem")
    editor = EDITORS[form](parent, record, rollouts.problems)
    try:
        attempts = _summarize(rollouts, slots, mixed, record)
        proposed = editor.criticize(
            [
                {
                    "problem": rollouts.problems[b].text,
                    "answer": rollouts.problems[b].answer,
                    "attempts": "\n".join(lines),
                }
                for b, lines in zip(mixed, attempts, strict=True)
            ]
        )
        if not proposed:
            return record.offspring(None, "no_edits")
        draft = editor.revise(proposed)
    except Unanswered:
        return record.offspring(None, "no_replies")
    if draft.prompt == parent:
        return record.offspring(None, "unchanged")
    mu, sigma = mutation_rating(parent, mutation_sigma)
    child = SystemPrompt(
        text=draft.prompt.text,
        principles=draft.prompt.principles,
        mu=mu,
        sigma=sigma,
        parents=(parent.id,),
        operator="mutation",
        edits=draft.edits,
        evidence={"problems": [rollouts.problems[b].id for b in mixed], **draft.evidence},
    )
    return record.offspring(child)


def _summarize(
    rollouts: Rollouts, slots: Sequence[int], mixed: Sequence[int], record: Record
) -> list[list[str]]:
    """Stage (a): for each mixed problem one line for each of its rollouts, verdict and summary."""
    places = [(i, b, j) for b in mixed for i in slots for j in range(rollouts.rewards.shape[2])]
    replies = record.summaries(
        [
            {
                "problem": rollouts.problems[b].text,
                "answer": rollouts.problems[b].answer,
                "attempt": rollouts.replies[i][b][j] or "(nothing)",
                "taken": rollouts.answers[i][b][j] or "(none found)",
                "verdict": verdict(rollouts, i, b, j),
            }
            for i, b, j in places
        ]
    )
    lines: dict[int, list[str]] = {b: [] for b in mixed}
    for (i, b, j), reply in zip(places, replies, strict=True):
        summary = clean(reply).removeprefix("Summary:").strip() or "(no summary)"
        lines[b].append(f"- {verdict(rollouts, i, b, j)}: {summary}")
    return [lines[b] for b in mixed]
