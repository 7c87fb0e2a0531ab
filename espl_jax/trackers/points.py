"""Turns records of the work directory into points."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espl_jax.evolution.population import prompt_from_json
from espl_jax.trackers.base import Point
from espl_jax.types import SystemPrompt

_GROUPS = {
    **dict.fromkeys(("reward", "success", "truncated", "new_tokens", "mixed_groups", "groups"), "rollouts"),
    **dict.fromkeys(("population", "drift_sigma"), "evolution"),
    "held_out": "validation",
}
"""Group of each number at the top of a metrics record; the others come from the update."""


def iteration_point(
    metrics: Mapping[str, Any], rollouts: Sequence[tuple[int, float]], prompts: Mapping[str, SystemPrompt]
) -> Point:
    """Returns the point of an iteration.

    Args:
      metrics: its line of `metrics.jsonl`.
      rollouts: (length in tokens, reward) of each rollout.
      prompts: all prompts so far by id. Those that entered in this iteration are logged as texts; the first
        iteration also logs the initial prompts.
    """
    step = metrics["iteration"]
    lengths, rewards = np.asarray(rollouts, np.float64).reshape(-1, 2).T
    entered = [
        each for each in prompts.values() if each.iteration == step or (step == 1 and not each.iteration)
    ]
    texts = {"prompts/entered": "\n\n".join(map(_described, entered))} if entered else {}
    best = metrics.get("best_prompt", {})
    if best.get("id") in prompts:
        rating = f"rating {best['mu']:.2f} ± {best['sigma']:.2f}"
        texts["prompts/best"] = _described(prompts[best["id"]], rating)
    histograms = {"distributions/reply_tokens": lengths, "distributions/reward": rewards}
    return Point(
        "iteration", step, scalars_of(metrics), {k: v for k, v in histograms.items() if v.size}, texts
    )


def results_point(results: Mapping[str, Any]) -> Point:
    """Returns the point of a run's test, from `results.json`."""
    best = prompt_from_json(dict(results["deployed"]))
    rating = f"rating {best.mu:.2f} ± {best.sigma:.2f}"
    text = f"{_described(best, rating)}\n\nReason: {results['reason']}"
    scalars = dict(_leaves({"test": results.get("test", {})}))
    return Point("results", results["iteration"], scalars, texts={"prompts/deployed": text})


def scalars_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns all numbers of a metrics record except lists and the iteration, as `group/name`."""
    found = {}
    for name, value in _leaves(metrics):
        if name != "iteration":
            found[name if "/" in name else f"{_GROUPS.get(name, 'update')}/{name}"] = value
    return found


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        name = re.sub(r"[^\w\-./ ]", "_", f"{prefix}{name}")
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}/")
        elif isinstance(value, int | float):
            yield name, float(value)


def _described(prompt: SystemPrompt, more: str = "") -> str:
    origin = f"{prompt.operator} of {', '.join(prompt.parents)}" if prompt.parents else prompt.operator
    head = ", ".join(filter(None, [f"{prompt.id}: {origin}", f"iteration {prompt.iteration}", more]))
    # Control characters and lone surrogates, which models can write, are not valid in every tracker.
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", prompt.render() or "(empty)")
    return f"{head}\n{text}"
