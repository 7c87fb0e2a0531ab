"""Environments and rewards of the user's own, given as `module:name`."""

from __future__ import annotations

import dataclasses
import importlib
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, cast

from espl_jax.environments.base import Dialogue, Environment, checked_grades, is_finite
from espl_jax.types import Grade, Problem

Reward = Callable[[Problem, Any, Grade], float]
"""A problem, the reply (a transcript in conversations of several turns) and its grade; the reward instead."""


def find(spec: str) -> Any:
    """What a `module:name` names; the module is imported, from the folder of the command too.

    Raises:
      ValueError: naming what is not there.
    """
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{spec!r}: {error}; run from its folder, or set PYTHONPATH") from error
    except AttributeError as error:
        raise ValueError(f"{spec!r}: {error}; correct the name") from error


def with_reward(environment: Environment | Dialogue, reward: Reward) -> Environment | Dialogue:
    """The environment with rewards of another function; what counts as a success stays."""
    return cast("Environment | Dialogue", _Rewarded(environment, reward))


@dataclasses.dataclass(frozen=True)
class _Rewarded:
    """Everything but the reward is the environment's."""

    environment: Any
    reward: Reward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.environment, name)

    def grade(self, problems: Sequence[Problem], replies: Sequence[Any]) -> list[Grade]:
        grades = checked_grades(self.environment, problems, replies)
        return [self._rewarded(*each) for each in zip(problems, replies, grades, strict=True)]

    def _rewarded(self, problem: Problem, reply: Any, grade: Grade) -> Grade:
        reward = self.reward(problem, reply, grade)
        if not is_finite(reward):
            raise ValueError(
                f"environment.reward gave {reprlib.repr(reward)} for problem {problem.id}; make it give a "
                "finite number"
            )
        return dataclasses.replace(grade, reward=float(reward))
