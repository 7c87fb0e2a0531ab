"""The family of prompts: where each came from, how it was rated, and what led to its edits."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from espl_jax.report.diffs import prompt_diff
from espl_jax.report.read import Record, RunLogs
from espl_jax.types import SystemPrompt

MOST_FEEDBACK = 8
"""Different texts of feedback that are shown for a birth."""

Feedback = Mapping[tuple[int, str], collections.Counter[str]]
"""(iteration, prompt) -> how often the environment said what about rollouts of that prompt."""


def tree(run: RunLogs) -> list[dict[str, Any]]:
    """Returns the nodes of the family tree, oldest first: ids and numbers only, and a row for each.

    The descendants of a member are in the rows next to it, so that most edges are short.
    """
    rows = _rows(run.members)
    return [
        {
            "id": each.id,
            "parents": list(each.parents),
            "operator": each.operator,
            "iteration": each.iteration,
            "row": rows[each.id],
            "mu": round(each.mu, 3),
            "sigma": round(each.sigma, 3),
            "living": each.id in run.living,
            "deployed": each.id == run.deployed,
            "games": len(each.tournaments),
            "ratings": [
                [game["iteration"], round(game["mu"], 3), round(game["sigma"], 3)]
                for game in each.tournaments
            ],
        }
        for each in run.members
    ]


def details(run: RunLogs, feedback: Feedback) -> dict[str, dict[str, Any]]:
    """Returns what a click on a member shows, by id.

    Args:
      run: the run.
      feedback: of the environment, by iteration and prompt.
    """
    members = {each.id: each for each in run.members}
    return {
        each.id: {
            "text": each.text,
            "principles": list(each.principles),
            "diffs": [
                {"parent": parent, "parts": prompt_diff(members[parent], each)}
                for parent in each.parents
                if parent in members
            ],
            "edits": [dict(edit) for edit in each.edits],
            "evidence": dict(each.evidence),
            "feedback": _feedback_at_birth(each, feedback),
            "tournaments": [dict(game) for game in each.tournaments],
        }
        for each in run.members
    }


def count_feedback(rollouts: Sequence[Record]) -> dict[tuple[int, str], collections.Counter[str]]:
    """Counts the feedback of an iteration's rollouts by (iteration, prompt)."""
    counts: dict[tuple[int, str], collections.Counter[str]] = {}
    for each in rollouts:
        if said := each.get("feedback"):
            counter = counts.setdefault((each["iteration"], each["prompt"]), collections.Counter())
            counter[said] += 1
    return counts


def _feedback_at_birth(member: SystemPrompt, feedback: Feedback) -> list[list[Any]]:
    """Returns [text, count] of the feedback on the parents' rollouts in the iteration of the birth."""
    total: collections.Counter[str] = collections.Counter()
    for parent in member.parents:
        total.update(feedback.get((member.iteration, parent), {}))
    return [list(pair) for pair in total.most_common(MOST_FEEDBACK)]


def _rows(members: Sequence[SystemPrompt]) -> dict[str, int]:
    """Returns the row of each member: depth first by first parents, so that a line of descent stays together.

    The oldest child continues the row of its parent; each sibling starts a new row.
    """
    children = collections.defaultdict(list)
    known = {each.id for each in members}
    for each in members:
        first = each.parents[0] if each.parents and each.parents[0] in known else ""
        children[first].append(each.id)
    rows: dict[str, int] = {}
    used = 0
    waiting = [(child, -1) for child in reversed(children[""])]
    while waiting:
        member, row = waiting.pop()
        if row < 0:
            row, used = used, used + 1
        rows[member] = row
        first, *others = children[member] or [None]
        waiting += [(other, -1) for other in reversed(others)]
        if first is not None:
            waiting.append((first, row))
    return rows
