"""Crossover: the best prompt takes over what other prompts did better (Zhang et al. 2026, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from espl_jax.evolution.editors import EDITORS
from espl_jax.evolution.edits import numbered
from espl_jax.evolution.principle_editor import show_principles
from espl_jax.evolution.ratings import crossover_rating, exceeds, ranking
from espl_jax.evolution.reflection import Offspring, Record, Unanswered
from espl_jax.evolution.settings import Evolution
from espl_jax.types import Problem, Reflect, Rollouts, SystemPrompt


def problems_won(scores: np.ndarray, margin: float = 0.01) -> list[list[int]]:
    """Which problems each prompt won: where its mean reward is above every other's by more than `margin`.

    Args:
      scores: Phi, [distinct prompts, B].
      margin: in units of reward.

    Returns:
      Indices of problems, one list for each prompt; all empty if there is only one prompt.
    """
    won: list[list[int]] = [[] for _ in scores]
    if len(scores) > 1:
        for b, column in enumerate(scores.T):
            second, first = np.sort(column)[-2:]
            if exceeds(first, second, margin):
                won[int(column.argmax())].append(b)
    return won


def crossover(
    parents: Sequence[SystemPrompt],
    rollouts: Rollouts,
    reflect: Reflect,
    settings: Evolution = Evolution(),
) -> Offspring:
    """A child of the best prompt that takes up what helped the other prompts on the problems they won.

    One call of `reflect` shows every winning prompt and the problems each won (set A is the best prompt) and
    asks for edits of set A, each with its evidence: `add`, `modify` and `remove` of principles, or blocks of
    prose. Whether an iteration has a crossover at all is the caller's draw.

    Args:
      parents: the distinct prompts that ran, in order of selection, with their ratings *after* the
        iteration's game; `[population.get(prompt.id) for prompt in rollouts.distinct()]`.
      rollouts: the iteration's.
      reflect: conversations in, replies out.
      settings: how prompts change; mean rewards within `tie_margin` tie for the first place, and win no
        problem.

    Returns:
      The child, with the score matrix and the problems won as its evidence, or None with one of the reasons
      `one_prompt`, `no_wins` (the best prompt won no problem, or no other did; `reflect` is not called),
      `no_edits`, `unchanged`, `no_replies` (the reflector did not answer).

    Raises:
      ValueError: `parents` are not the distinct prompts of the rollouts, or `reflect` gave a wrong number of
        replies.
    """
    ids = [parent.id for parent in parents]
    if ids != list(rollouts.slots()):
        raise ValueError(f"parents={ids}: must be the prompts that ran, in order, {list(rollouts.slots())}")
    record, form, tie_margin = Record(reflect, settings), settings.form, settings.tie_margin
    if len(parents) < 2:
        return record.offspring(None, "one_prompt")
    scores = rollouts.score_matrix()
    won = dict(zip(ids, problems_won(scores, tie_margin), strict=True))
    best_id = ranking(ids, scores.mean(axis=1), tie_margin)[0][0]
    best = parents[ids.index(best_id)]
    others = [parent for parent in parents if won[parent.id] and parent is not best]
    if not won[best_id] or not others:
        return record.offspring(None, "no_wins")

    sets = [
        _show_set(chr(ord("A") + i), parent, form, [rollouts.problems[b] for b in won[parent.id]])
        for i, parent in enumerate([best, *others])
    ]
    try:
        draft, usable = EDITORS[form](best, record, rollouts.problems).cross({"sets": "\n\n".join(sets)})
    except Unanswered:
        return record.offspring(None, "no_replies")
    if not usable:
        return record.offspring(None, "no_edits")
    if draft.prompt == best:
        return record.offspring(None, "unchanged")
    mu, sigma = crossover_rating([best, *others], settings.crossover_sigma)
    child = SystemPrompt(
        text=draft.prompt.text,
        principles=draft.prompt.principles,
        mu=mu,
        sigma=sigma,
        parents=(best_id, *[parent.id for parent in others]),
        operator="crossover",
        edits=draft.edits,
        evidence={
            "won": {
                parent.id: [rollouts.problems[b].id for b in won[parent.id]] for parent in [best, *others]
            },
            "problems": [problem.id for problem in rollouts.problems],
            "scores": dict(zip(ids, scores.tolist(), strict=True)),
        },
    )
    return record.offspring(child)


def _show_set(letter: str, prompt: SystemPrompt, form: str, won: Sequence[Problem]) -> str:
    """One prompt and its wins. Only set A has ids, so that no edit can name another set's principle."""
    instructions = f"Instructions: {prompt.text}\n" if prompt.text else ""
    if form == "prose":
        listed = instructions or "(empty)\n"
    elif letter == "A":
        listed = f"{instructions}{show_principles(numbered(prompt.principles))}\n"
    else:
        shown = "\n".join(f"- {principle}" for principle in prompt.principles)
        listed = f"{instructions}{shown or '(none)'}\n"
    tasks = "\n".join(f"- {problem.text}" for problem in won)
    return f"Set {letter}\n{listed}Tasks won by set {letter}:\n{tasks}"
