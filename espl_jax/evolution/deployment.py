"""Which prompt to deploy, and why; never chosen on the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from espl_jax.evolution.population import Population
from espl_jax.types import SystemPrompt

RULES = ("ratings", "newest", "validation")


class Choice(NamedTuple):
    """A prompt to deploy.

    Attributes:
      prompt: the member.
      reason: one sentence that says how it was chosen.
    """

    prompt: SystemPrompt
    reason: str


def lower_bound(member: SystemPrompt) -> float:
    """mu - 2 sigma: what a member is at least worth, nearly surely."""
    return member.mu - 2 * member.sigma


def best_rated(population: Population, min_tournaments: int = 1) -> Choice:
    """The highest mu - 2 sigma among the members with so many rated tournaments; of equals the older.

    A bound alone could choose a prompt that nobody has played: that of a fresh root is 25 - 50/3 = 8.3, more
    than that of a root that has lost a game (18.3 - 13.3), and a crossover child may begin with a smaller
    sigma than its parents. Where no member has as many tournaments, those with the most compete; where nobody
    was ever rated (one prompt an iteration) this is the best of the birth ratings, usually the root: choose
    on validation there.

    Raises:
      ValueError: for a negative number.
    """
    if min_tournaments < 0:
        raise ValueError(f"min_tournaments={min_tournaments}: give 0 or more")
    most = max(len(member.tournaments) for member in population.members)
    needed = min(min_tournaments, most)
    eligible = [member for member in population.members if len(member.tournaments) >= needed]
    best = max(eligible, key=lower_bound)
    reason = (
        f"highest mu - 2 sigma, {lower_bound(best):.2f}, of the {len(eligible)} members with {needed} or "
        "more tournaments"
    )
    if needed < min_tournaments:
        reason += f" (none has the {min_tournaments} asked for)"
    return Choice(best, reason)


def newest(population: Population) -> Choice:
    """The member that entered last."""
    return Choice(population.members[-1], f"newest of {len(population.members)} members")


def deployed(population: Population, mode: str, settings: Any) -> Choice:
    """The prompt to deploy as far as ratings say; `best_validated` goes further.

    Args:
      population: the living members.
      mode: of the run. In `rl` there is only the root; in `reflection` nobody is rated, and each prompt
        replaces the one before.
      settings: with `rule` and `min_tournaments`, as the config's `deployment`.
    """
    if mode == "rl":
        return Choice(population.members[0], "the root, which mode=rl trains under")
    if mode == "reflection":
        return Choice(population.members[-1], "the newest, since nobody is rated in mode=reflection")
    if settings.rule == "newest":
        return newest(population)
    return best_rated(population, settings.min_tournaments)


def best_validated(
    population: Population,
    validate: Callable[[Sequence[SystemPrompt]], Sequence[float]],
    candidates: int,
) -> Choice:
    """The best on the validation problems, of the oldest member, the newest, and the best by mu - 2 sigma.

    Args:
      population: the living members.
      validate: members in, mean reward of each on the validation problems out.
      candidates: at most so many members are tried.

    Returns:
      The member; of equals the one with the higher mu - 2 sigma.
    """
    if candidates < 1:
        raise ValueError(f"candidates={candidates}: give at least 1")
    members = population.members
    rated = sorted(members, key=lambda each: (bool(each.tournaments), lower_bound(each)), reverse=True)
    ordered = [rated[0], members[-1], members[0], *rated[1:]]
    tried = list({member.id: member for member in ordered}.values())[:candidates]
    means = [float(mean) for mean in validate(tried)]
    best, mean = max(zip(tried, means, strict=True), key=lambda pair: (pair[1], lower_bound(pair[0])))
    others = ", ".join(f"{member.id} {value:.3f}" for member, value in zip(tried, means, strict=True))
    return Choice(best, f"highest mean reward on validation, {mean:.3f}, of {others}")
