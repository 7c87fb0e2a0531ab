"""Mutation: the best prompt learns from its own rollouts (Zhang et al. 2026, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from espl_jax.evolution.attempts import (
    Attempt,
    choose_attempts,
    is_summarized,
    problem_values,
    summary_values,
)
from espl_jax.evolution.drafts import Draft
from espl_jax.evolution.editors import EDITORS
from espl_jax.evolution.ratings import mutation_rating
from espl_jax.evolution.reflection import Offspring, Record, Rejected, Unanswered, shown_rejected
from espl_jax.evolution.settings import Evolution
from espl_jax.types import Reflect, Rollouts, SystemPrompt


def mutate(
    parent: SystemPrompt,
    rollouts: Rollouts,
    reflect: Reflect,
    settings: Evolution = Evolution(),
    *,
    rng: np.random.Generator | None = None,
    members: Sequence[SystemPrompt] = (),
    rejected: Sequence[Rejected] = (),
) -> Offspring:
    """Returns a child of the iteration's best prompt.

    The paper's three stages, each one batched call of `reflect`: (a) a summary of every long attempt at the
    problems that are reflected on (copies of the prompt pooled); (b) for each such problem a critique that
    proposes edits; (c) one revision of all that was proposed, see `PrincipleEditor` and `ProseEditor`. With
    `stages=1`, summaries are followed by a single call for all problems.

    Args:
      parent: rank 1 of this iteration, with its rating *after* the iteration's game.
      rollouts: the iteration's; the parent must be among its prompts.
      reflect: conversations in, replies out.
      settings: how prompts change.
      rng: draws problems and attempts where there are too many; seeded with 0 by default.
      members: the living members, whose principles are not repeated.
      rejected: edits that were refused before, the newest last.

    Returns:
      The child, or None with one of the reasons `no_problems` (nothing to reflect on; `reflect` is not
      called), `no_edits`, `unchanged`, `no_replies` (the reflector answered no conversation of a stage).

    Raises:
      ValueError: the parent has no rollouts, or `reflect` gave a wrong number of replies.
    """
    slots = rollouts.slots().get(parent.id)
    if slots is None:
        raise ValueError(f"parent {parent.id!r} has no rollouts: only {list(rollouts.slots())} have any")
    asked = settings.reflection
    others = [member for member in members if member.id != parent.id]
    record = Record(reflect, settings, others, shown_rejected(rejected, asked.rejected_edits))
    chosen = choose_attempts(rollouts, slots, asked, rng or np.random.default_rng(0))
    if not chosen:
        return record.offspring(None, "no_problems")
    try:
        draft = _drafted(parent, rollouts, chosen, settings, record)
    except Unanswered:
        return record.offspring(None, "no_replies")
    if draft is None:
        return record.offspring(None, "no_edits")
    if draft.prompt == parent:
        return record.offspring(None, "unchanged")
    mu, sigma = mutation_rating(parent, settings.mutation_sigma)
    reflected = [rollouts.problems[attempts[0].problem].id for attempts in chosen]
    child = SystemPrompt(
        text=draft.prompt.text,
        principles=draft.prompt.principles,
        mu=mu,
        sigma=sigma,
        parents=(parent.id,),
        operator="mutation",
        edits=draft.edits,
        evidence={"problems": reflected, **draft.evidence},
    )
    return record.offspring(child)


def _drafted(
    parent: SystemPrompt,
    rollouts: Rollouts,
    chosen: Sequence[Sequence[Attempt]],
    settings: Evolution,
    record: Record,
) -> Draft | None:
    """What reflection makes of the parent; None where nothing usable was proposed. Raises `Unanswered`."""
    asked = settings.reflection
    long = [each for attempts in chosen for each in attempts if is_summarized(rollouts, each, asked)]
    summaries: dict[Attempt, str | None] = {}
    if long:
        replies = record.summaries([summary_values(rollouts, attempt, asked) for attempt in long])
        summaries = dict(zip(long, replies, strict=True))
    values = [problem_values(rollouts, attempts, summaries, asked) for attempts in chosen]
    editor = EDITORS[settings.form](parent, record, rollouts.problems)
    if asked.stages == 3:
        proposed = editor.criticize(values)
        return editor.revise(proposed) if proposed else None
    problems = "\n\n".join(f"Case {number}\n{each['case']}" for number, each in enumerate(values, start=1))
    draft, usable = editor.rewrite(problems) if asked.output == "rewrite" else editor.reflect(problems)
    return draft if usable else None
