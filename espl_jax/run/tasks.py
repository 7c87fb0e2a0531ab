"""Builds the problem sets and the environment of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from espl_jax.choices import ENVIRONMENTS
from espl_jax.data import load
from espl_jax.data.problems import ProblemSet, check_disjoint, hold_out
from espl_jax.environments import own
from espl_jax.environments.arithmetic import Arithmetic
from espl_jax.environments.base import Dialogue, Environment, is_dialogue
from espl_jax.environments.math import Math
from espl_jax.environments.reasoning_gym import ReasoningGym
from espl_jax.environments.retrievers.bm25 import Bm25
from espl_jax.environments.retrievers.load import Retriever, open_retriever
from espl_jax.environments.search import Search
from espl_jax.parallel import processes
from espl_jax.run.config import Config
from espl_jax.types import Schema


def load_splits(config: Config) -> dict[str, ProblemSet]:
    """Loads `train`, `validation`, and `test` if there is one; the splits are disjoint.

    Raises:
      ValueError: for unusable data, overlapping splits, or fewer training problems than a batch.
    """
    fields = {field: name for field, name in config.data.fields.items() if name} or None
    splits = {"train": load.load(config.data.train, "train", fields=fields)}
    if config.data.validation:
        splits["validation"] = load.load(config.data.validation, "validation", fields=fields)
    else:
        splits["train"], splits["validation"] = hold_out(
            splits["train"], config.data.validation_count, config.seed
        )
    if config.data.test:
        splits["test"] = load.load(config.data.test, "test", fields=fields)
    check_disjoint(**splits)
    check_batch(config, splits["train"])
    return splits


def check_batch(config: Config, train: ProblemSet) -> None:
    """Raises ValueError if there are fewer training problems than a batch needs."""
    if config.batch_size > len(train):
        raise ValueError(
            f"batch_size={config.batch_size}: data.train has only {len(train)} problems after validation was "
            "held out; lower batch_size or data.validation_count, or give more problems"
        )


def environment_of(config: Config) -> Environment | Dialogue:
    """Returns the environment of a configuration."""
    e = config.environment
    options = e[e.name].to_dict() if e.name in ("math", "search") else json.loads(e.options)
    return make_environment(e.name, e.answer_format, e.instruction, options, e.reward, config.data.train)


def has_turns(config: Config) -> bool:
    """Returns whether rollouts have several turns, without opening a retriever."""
    if config.environment.name in ENVIRONMENTS:
        return config.environment.name == "search"
    return is_dialogue(environment_of(config))


def tools_of(config: Config) -> tuple[Schema, ...]:
    """Returns the tools available to rollouts, without opening a retriever.

    Raises:
      ValueError: if a user-defined environment cannot be constructed.
    """
    if config.environment.name in ENVIRONMENTS:
        return tuple(Search.tools) if config.environment.name == "search" else ()
    return tuple(getattr(environment_of(config), "tools", ()))


def make_environment(
    name: str,
    answer_format: str,
    instruction: str | None,
    options: Mapping[str, Any],
    reward: str = "",
    problems: str = "",
) -> Environment | Dialogue:
    """Returns the environment with the given name.

    Args:
      name: `math`, `arithmetic`, `reasoning_gym`, `search`, or `module:name` of a user-defined environment,
        which is called with `options`.
      answer_format: for all but `search` and user-defined environments.
      instruction: for all but user-defined environments.
      options: further arguments; for `search` including `retriever`, as `open_retriever` takes it.
      reward: `module:function`, see `environments.own.Reward`; empty for the environment's own reward.
      problems: the data spec; if it is an encyclopedia and no retriever is given, its passages are searched.

    Raises:
      ValueError: for arguments that the environment does not take, or a retriever that cannot be opened.
    """
    try:
        if name == "search":
            environment = _search(instruction, problems, **options)
        elif name in ENVIRONMENTS:
            kind = {"math": Math, "arithmetic": Arithmetic, "reasoning_gym": ReasoningGym}[name]
            environment = kind(answer_format, instruction, **options)
        else:
            environment = own.find(name)(**options)
    except TypeError as error:
        raise ValueError(f"environment.options={dict(options)}: {error}") from error
    return own.with_reward(environment, own.find(reward)) if reward else environment


def _search(
    instruction: str | None, problems: str, retriever: str = "", timeout: float = 30.0, **options: Any
) -> Search:
    def opened() -> Retriever:
        return open_retriever(retriever, timeout) if retriever else Bm25(load.passages(problems))

    return Search(processes.only_first(opened), timeout=timeout, instruction=instruction, **options)
