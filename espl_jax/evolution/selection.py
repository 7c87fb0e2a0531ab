"""Which prompts run in an iteration, chosen among the newest members (Zhang et al. 2026, equation 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from espl_jax.evolution.population import Population
from espl_jax.types import SystemPrompt


def optimistic_scores(members: Sequence[SystemPrompt], optimism: float) -> np.ndarray:
    """mu + optimism * sigma of each member, float64 [members]."""
    return np.array([member.mu + optimism * member.sigma for member in members])


def softmax(
    candidates: Sequence[SystemPrompt],
    count: int,
    rng: np.random.Generator,
    *,
    optimism: float,
    temperature: float | None,
) -> list[SystemPrompt]:
    """Draws one after the other without replacement, p proportional to exp(score / temperature).

    The `count` largest of score / temperature + Gumbel noise follow exactly that law, in the order drawn.
    """
    scores = optimistic_scores(candidates, optimism)
    if temperature is None:
        temperature = max(1.0, scores.max())
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, which is right
        keys = (scores - scores.max()) / temperature + rng.gumbel(size=len(scores))
    return [candidates[i] for i in np.argsort(-keys, kind="stable")[:count]]


def uniform(
    candidates: Sequence[SystemPrompt], count: int, rng: np.random.Generator, **_: float | None
) -> list[SystemPrompt]:
    """Draws one after the other without replacement, each with the same chance."""
    return [candidates[i] for i in rng.permutation(len(candidates))[:count]]


def ucb(
    candidates: Sequence[SystemPrompt],
    count: int,
    rng: np.random.Generator,
    *,
    optimism: float,
    **_: float | None,
) -> list[SystemPrompt]:
    """The `count` highest scores, mu + optimism * sigma; of equals the older first."""
    order = np.argsort(-optimistic_scores(candidates, optimism), kind="stable")
    return [candidates[i] for i in order[:count]]


def lucb(
    candidates: Sequence[SystemPrompt],
    count: int,
    rng: np.random.Generator,
    *,
    optimism: float,
    **_: float | None,
) -> list[SystemPrompt]:
    """The champion, best by mu - optimism * sigma, and then challengers as `ucb` chooses them.

    Kalyanakrishnan et al., "PAC subset selection in stochastic multi-armed bandits", ICML 2012.
    """
    champion = candidates[int(np.argmax(optimistic_scores(candidates, -optimism)))]
    others = [member for member in candidates if member is not champion]
    return [champion, *ucb(others, count - 1, rng, optimism=optimism)]


STRATEGIES: dict[str, Callable[..., list[SystemPrompt]]] = {
    "softmax": softmax,
    "uniform": uniform,
    "ucb": ucb,
    "lucb": lucb,
}


def select(
    population: Population,
    count: int,
    strategy: str,
    rng: np.random.Generator,
    window: int = 10,
    optimism: float = 2.0,
    temperature: float | None = None,
) -> tuple[SystemPrompt, ...]:
    """The system prompts of one iteration, drawn from the newest members without replacement.

    The newest member always runs: where it was not chosen it takes the place of the weakest that was, the
    lowest score (in `lucb` of the challengers; the champion stays unless it is alone). With fewer than
    `count` candidates the rest of the slots are copies of the newest.

    Args:
      population: whom to draw from.
      count: M, how many slots to fill.
      strategy: a name in `STRATEGIES`.
      rng: advanced by one draw of `softmax` or `uniform`; the others draw nothing.
      window: K, only so many of the newest members can be chosen.
      optimism: lambda in the score mu + lambda * sigma.
      temperature: of the softmax over scores; None for max(1, highest score), which is nearly flat.

    Returns:
      `count` members, in order of selection.

    Raises:
      ValueError: an unknown strategy, a count or window below 1, or a temperature that is not positive.
    """
    if count < 1:
        raise ValueError(f"count={count}: must be at least 1")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown: choose one of {sorted(STRATEGIES)}")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive, or None for max(1, highest score)")
    candidates = population.newest(window)
    newest = candidates[-1]
    chosen = STRATEGIES[strategy](candidates, count, rng, optimism=optimism, temperature=temperature)
    if newest.id not in [member.id for member in chosen]:
        stays = int(strategy == "lucb" and len(chosen) > 1)
        scores = optimistic_scores(chosen[stays:], optimism)
        # Of equally weak members the one chosen last gives way.
        weakest = max(i for i, score in enumerate(scores) if score == scores.min())
        chosen[stays + weakest] = newest
    return (*chosen, *[newest] * (count - len(chosen)))
