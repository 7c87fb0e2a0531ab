"""Crossover: the best prompt takes over what other prompts did better (Zhang et al. 2026, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from espl_jax.evolution.edit_limits import drop_not_allowed
from espl_jax.evolution.edits import (
    Add,
    Modify,
    Remove,
    drop_conflicts,
    drop_unknown,
    edit_entries,
    edit_to_json,
    numbered,
    parse_edits,
)
from espl_jax.evolution.ratings import crossover_rating, exceeds, ranking
from espl_jax.evolution.reflection import Offspring, Record, fit, presentable, show_principles
from espl_jax.evolution.templates import load_template
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
    *,
    max_words: int = 32,
    max_principles: int | None = None,
    tie_margin: float = 0.01,
    crossover_sigma: float = 1.0,
    opening: bool = True,
) -> Offspring:
    """A child of the best prompt that takes up what helped the other prompts on the problems they won.

    One call of `reflect` shows every winning prompt's principles and the problems each won (set A is the
    best prompt) and asks for edits of set A: `add`, `modify`, `remove`, each with its evidence. Whether an
    iteration has a crossover at all is the caller's draw.

    Args:
      parents: the distinct prompts that ran, in order of selection, with their ratings *after* the
        iteration's game; `[population.get(prompt.id) for prompt in rollouts.distinct()]`.
      rollouts: the iteration's.
      reflect: conversations in, replies out.
      max_words: of each new principle; longer ones are cut.
      max_principles: new principles beyond so many in all are left out; None for no limit.
      tie_margin: mean rewards this close tie for the first place, and win no problem.
      crossover_sigma: Delta sigma, what the child's uncertainty grows by.
      opening: write the beginning of the reply for the model.

    Returns:
      The child, or None with one of the reasons `one_prompt`, `no_wins` (the best prompt won no problem, or
      no other did; `reflect` is not called), `no_edits`, `unchanged`.

    Raises:
      ValueError: `parents` are not the distinct prompts of the rollouts, or `reflect` gave a wrong number of
        replies.
    """
    ids = [parent.id for parent in parents]
    if ids != list(rollouts.slots()):
        raise ValueError(f"parents={ids}: must be the prompts that ran, in order, {list(rollouts.slots())}")
    record = Record(reflect)
    if len(parents) < 2:
        return record.offspring(None, "one_prompt")
    scores = rollouts.score_matrix()
    won = dict(zip(ids, problems_won(scores, tie_margin), strict=True))
    best_id = ranking(ids, scores.mean(axis=1), tie_margin)[0][0]
    best = parents[ids.index(best_id)]
    others = [parent for parent in parents if won[parent.id] and parent is not best]
    if not won[best_id] or not others:
        return record.offspring(None, "no_wins")

    principles = numbered(best.principles)
    conversation = load_template("crossover").conversation(
        opening=opening,
        sets="\n\n".join(
            _show_set(chr(ord("A") + i), parent, [rollouts.problems[b] for b in won[parent.id]])
            for i, parent in enumerate([best, *others])
        ),
        max_words=max_words,
    )
    (reply,) = record.ask("crossover", [conversation])
    edits = record.kept(drop_not_allowed(record.kept(parse_edits(reply)), (Add, Modify, Remove)))
    edits = record.kept(drop_unknown(edits, principles))
    problems = [problem.text for problem in rollouts.problems]
    edits = record.kept(drop_conflicts(presentable(edits, principles, problems, max_words, record)))
    if not edits:
        return record.offspring(None, "no_edits")
    revised, cut = fit(best, edit_entries(principles, edits), max_principles, record)
    if revised == best.principles:
        return record.offspring(None, "unchanged")
    mu, sigma = crossover_rating([best, *others], crossover_sigma)
    child = SystemPrompt(
        text=best.text,
        principles=revised,
        mu=mu,
        sigma=sigma,
        parents=(best_id, *[parent.id for parent in others]),
        operator="crossover",
        edits=(*map(edit_to_json, edits), *cut),
        evidence={
            "won": {
                parent.id: [rollouts.problems[b].id for b in won[parent.id]] for parent in [best, *others]
            }
        },
    )
    return record.offspring(child)


def _show_set(letter: str, prompt: SystemPrompt, won: Sequence[Problem]) -> str:
    """One prompt and its wins. Only set A has ids, so that no edit can name another set's principle."""
    listed = (
        show_principles(numbered(prompt.principles))
        if letter == "A"
        else "\n".join(f"- {principle}" for principle in prompt.principles) or "(none)"
    )
    instructions = f"Instructions: {prompt.text}\n" if prompt.text else ""
    tasks = "\n".join(f"- {problem.text}" for problem in won)
    return f"Set {letter}\n{instructions}{listed}\nTasks won by set {letter}:\n{tasks}"
