"""The population of system prompts: who lives, who enters, who leaves, and its form on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from espl_jax.types import SystemPrompt


class Added(NamedTuple):
    """What `Population.add` did.

    Attributes:
      population: the population with the accepted children.
      accepted: the children that entered, with the ids they were given, in order.
      rejected: (child, reason) pairs; the reason is `empty` or `equal to <id of the living member>`.
    """

    population: Population
    accepted: tuple[SystemPrompt, ...]
    rejected: tuple[tuple[SystemPrompt, str], ...]


@dataclasses.dataclass(frozen=True)
class Population:
    """System prompts alive at one moment (Zhang et al. 2026, section 3).

    Attributes:
      members: oldest first, each with its rating; never empty, ids unique.
      max_size: at most so many members; the oldest leave first.
      created: how many ids were ever given, so that `p<created>` is the next one.
      rated: ids of living members that have taken part in a rated tournament.
    """

    members: tuple[SystemPrompt, ...]
    max_size: int
    created: int
    rated: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        ids = [member.id for member in self.members]
        if not ids:
            raise ValueError("members=(): a population needs at least one system prompt, which may be empty")
        if len(set(ids)) < len(ids):
            raise ValueError(f"members have the ids {ids}: ids must be unique")
        if len(ids) > self.max_size:
            raise ValueError(f"max_size={self.max_size} is less than the {len(ids)} members: raise max_size")

    def get(self, member_id: str) -> SystemPrompt:
        """The living member of this id. Raises KeyError if there is none."""
        for member in self.members:
            if member.id == member_id:
                return member
        raise KeyError(f"no living member {member_id!r}; there are {[member.id for member in self.members]}")

    def newest(self, window: int) -> tuple[SystemPrompt, ...]:
        """The `window` newest members, oldest of them first; all of them if there are fewer."""
        if window < 1:
            raise ValueError(f"window={window}: must be at least 1")
        return self.members[-window:]

    def best(self) -> SystemPrompt:
        """The member to deploy by ratings alone: the highest mu - 2 sigma.

        Members that have never been rated come after all that have: a fresh root's mu - 2 sigma is 25 - 50/3
        = 8.3, more than that of a root that has lost a game (18.3 - 13.3), and a crossover child may begin
        with a smaller sigma than its parents, so the bound alone could choose one that nobody has played.
        Equal bounds go to the older. Where nobody was ever rated (one prompt an iteration) this is the best
        of the birth ratings, usually the root: choose on validation there.
        """
        played = [member for member in self.members if member.id in self.rated]
        return max(played or self.members, key=lambda member: member.mu - 2 * member.sigma)

    def add(self, children: Iterable[SystemPrompt], iteration: int) -> Added:
        """Lets children enter, in the order given (crossover child first, mutation child last).

        A child without any content, or whose rendered text equals that of a living member (an earlier child
        of this call included), does not enter and uses up no id.

        Args:
          children: system prompts without ids, with their birth ratings.
          iteration: the iteration that made them, recorded in each.
        """
        population, accepted, rejected = self, [], []
        for child in children:
            rendered = child.render()
            equal = [member.id for member in population.members if member.render() == rendered]
            if not rendered.strip():
                rejected.append((child, "empty"))
            elif equal:
                rejected.append((child, f"equal to {equal[0]}"))
            else:
                born = dataclasses.replace(child, id=f"p{population.created}", iteration=iteration)
                members = (*population.members, born)[-self.max_size :]
                population = Population(
                    members, self.max_size, population.created + 1, _living(population.rated, members)
                )
                accepted.append(born)
        return Added(population, tuple(accepted), tuple(rejected))

    def with_ratings(self, ratings: dict[str, tuple[float, float]]) -> Population:
        """The same members, those in `ratings` (id -> (mu, sigma)) with new ratings and marked rated."""
        for member_id in ratings:
            self.get(member_id)
        members = tuple(
            dataclasses.replace(member, mu=ratings[member.id][0], sigma=ratings[member.id][1])
            if member.id in ratings
            else member
            for member in self.members
        )
        return dataclasses.replace(self, members=members, rated=self.rated | frozenset(ratings))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` gives back an equal population, every float bit for bit.

        Raises ValueError for ratings that are not finite, TypeError for evidence that JSON cannot hold.
        """
        saved = {
            "max_size": self.max_size,
            "created": self.created,
            "rated": sorted(self.rated),
            "members": [dataclasses.asdict(member) for member in self.members],
        }
        return json.loads(json.dumps(saved, allow_nan=False))


def start(roots: Sequence[SystemPrompt], max_size: int) -> Population:
    """A population of first prompts, given the ids p0, p1, ... in order.

    The paper starts with one root, an empty prompt for the math tasks. Ratings are kept as they come (25 and
    25/3 unless set). Raises ValueError if there is no root, if two render alike, or if max_size is too small.
    """
    rendered = [root.render() for root in roots]
    for i, text in enumerate(rendered):
        if text in rendered[:i]:
            raise ValueError(
                f"roots {rendered.index(text)} and {i} are the same prompt: leave one of them out"
            )
    members = tuple(
        dataclasses.replace(root, id=f"p{i}", parents=(), operator="root", iteration=0)
        for i, root in enumerate(roots)
    )
    return Population(members, max_size, len(members))


def from_json(saved: dict[str, Any]) -> Population:
    """The population that `Population.to_json` saved. Raises ValueError naming a field missing or unknown."""
    _check_fields("population", saved, {"max_size", "created", "rated", "members"})
    members = tuple(prompt_from_json(member, f"members[{i}]") for i, member in enumerate(saved["members"]))
    return Population(members, saved["max_size"], saved["created"], frozenset(saved["rated"]))


def prompt_from_json(saved: dict[str, Any], where: str = "the prompt") -> SystemPrompt:
    """The system prompt whose fields were saved, tuples as lists. Raises ValueError as `from_json` does."""
    _check_fields(where, saved, {field.name for field in dataclasses.fields(SystemPrompt)})
    tuples = {name: tuple(saved[name]) for name in ("principles", "parents", "edits")}
    return SystemPrompt(**{**saved, **tuples})


def _living(ids: frozenset[str], members: Iterable[SystemPrompt]) -> frozenset[str]:
    return ids & {member.id for member in members}


def _check_fields(where: str, found: dict[str, Any], expected: set[str]) -> None:
    if not isinstance(found, dict) or set(found) != expected:
        has = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{where} of the saved population has {has}, expected {sorted(expected)}")
