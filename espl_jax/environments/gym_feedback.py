"""Feedback on answers to particular tasks of reasoning-gym: what is wrong, never what is right."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping

from espl_jax.gym import Entry

# The example comes first in the question; the task is the last one.
_STAR = re.compile(r"(?P<edges>(?:\|\d+ \d+)+)/(?P<start>\d+) (?P<target>\d+) = *(?=\n|\Z)")


def path_star(answer: str, entry: Entry) -> str:
    """Says where a path through a star graph breaks.

    The path begins at the first of the two nodes after the slash. For `reversed=true` this is the end of an
    arm, and the path follows the edges backward.

    Args:
      answer: nodes separated by spaces.
      entry: the problem.

    Returns:
      The first fault. Empty if every step follows an edge from the start to the target.
    """
    *_, task = _STAR.finditer(entry["question"])
    edges = {tuple(edge.split()) for edge in task["edges"].strip("|").split("|")}
    nodes = {node for edge in edges for node in edge}
    if task["start"] != str(entry["metadata"]["center"]):
        edges = {(after, before) for before, after in edges}
    path = answer.split()
    for word in path:
        if not re.fullmatch(r"\d+", word, re.ASCII):
            return f"{word[:40]!r} is no node. The answer is a sequence of nodes, separated by single spaces."
    if not path or path[0] != task["start"]:
        return f"The path has to begin at node {task['start']}."
    for step, (before, after) in enumerate(itertools.pairwise(path), start=1):
        if after not in nodes:
            return f"There is no node {after[:40]} in the graph (step {step})."
        if (before, after) not in edges:
            return f"There is no edge from {before} to {after} (step {step})."
    if path[-1] != task["target"]:
        return f"The path ends at {path[-1]}, not at the target."
    return ""


FEEDBACK: Mapping[str, Callable[[str, Entry], str]] = {"path_star": path_star}
"""Task -> function of (wrong answer, entry) that says what is wrong; empty text if it knows nothing."""
