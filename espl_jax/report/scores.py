"""Rewards by prompt and problem, and the advantages of rollouts."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from espl_jax.report.read import Record
from espl_jax.rl.advantages import advantages


class Scores:
    """Collects mean rewards by iteration, prompt and problem.

    Attributes:
      problems: ids of the problems, in order of appearance.
    """

    def __init__(self) -> None:
        self._problems: dict[str, int] = {}
        self._cells: list[tuple[int, str, int, float, int]] = []

    @property
    def problems(self) -> list[str]:
        """Returns the ids of the problems, in order of appearance."""
        return list(self._problems)

    def add(self, iteration: int, rollouts: Sequence[Record]) -> None:
        """Adds the rollouts of an iteration."""
        rewards: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
        for each in rollouts:
            problem = self._problems.setdefault(each["problem"], len(self._problems))
            rewards[each["prompt"], problem].append(each["reward"])
        for (prompt, problem), values in rewards.items():
            mean = round(float(np.mean(values)), 4)
            self._cells.append((iteration, prompt, problem, mean, len(values)))

    def to_json(self) -> dict[str, Any]:
        """Returns the ids of problems, and a row `[iteration, prompt, problem, mean reward, rollouts]` for
        each cell; problems are numbers of the list."""
        return {"problems": self.problems, "cells": [list(cell) for cell in self._cells]}


def advantages_of(rollouts: Sequence[Record], loss: Record) -> list[float | None]:
    """Returns the advantage of each rollout of an iteration, as the run computed it from the rewards.

    Args:
      rollouts: all rollouts of the iteration, in any order.
      loss: the run's configuration of the loss.

    Returns:
      One number for each rollout; None for all of them if the log does not have every rollout.
    """
    slots = sorted({each["slot"] for each in rollouts})
    problems = list(dict.fromkeys(each["problem"] for each in rollouts))
    samples = sorted({each["sample"] for each in rollouts})
    if len(slots) * len(problems) * len(samples) != len(rollouts):
        return [None] * len(rollouts)
    places = [
        (slots.index(each["slot"]), problems.index(each["problem"]), samples.index(each["sample"]))
        for each in rollouts
    ]
    rewards = np.zeros((len(slots), len(problems), len(samples)), np.float32)
    ids = [""] * len(slots)
    for place, each in zip(places, rollouts, strict=True):
        rewards[place], ids[place[0]] = each["reward"], each["prompt"]
    numbers = np.array([ids.index(each) for each in ids], np.int32)
    weights = np.asarray(
        advantages(
            rewards,
            loss.get("baseline", "per_prompt"),
            numbers,
            loss.get("normalize_advantages", "none"),
        )
    )
    return [round(float(weights[place]), 4) for place in places]
