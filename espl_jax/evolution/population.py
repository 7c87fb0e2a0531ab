"""The population of system prompts: who lives, who enters, who leaves, and its form on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from espl_jax.types import SystemPrompt


class Added(NamedTuple):
    """What `Population.add` did.

    Attributes:
      population: the population with the accepted children.
      accepted: the children that entered, with the ids they were given, in order.
      rejected: (child, reason) pairs; the reason is `empty` or `equal to <id of the living member>`.
      evicted: the members that had to leave, in order.
    """

    population: Population
    accepted: tuple[SystemPrompt, ...]
    rejected: tuple[tuple[SystemPrompt, str], ...]
    evicted: tuple[SystemPrompt, ...]


@dataclasses.dataclass(frozen=True)
class Population:
    """System prompts alive at one moment (Zhang et al. 2026, section 3).

    Attributes:
      members: oldest first, each with its rating; never empty, ids unique.
      max_size: at most so many members; the oldest leave first.
      created: how many ids were ever given, so that `p<created>` is the next one.
    """

    members: tuple[SystemPrompt, ...]
    max_size: int
    created: int

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

    def add(self, children: Iterable[SystemPrompt], iteration: int, duplicates: bool = False) -> Added:
        """Lets children enter, in the order given (crossover child first, mutation child last).

        A child without any content does not enter and uses up no id, nor does one whose rendered text equals
        that of a living member (an earlier child of this call included); white space, case, and punctuation
        at the ends of lines make no difference.

        Args:
          children: system prompts without ids, with their birth ratings.
          iteration: the iteration that made them, recorded in each.
          duplicates: let equals of living members enter too.
        """
        population, accepted, rejected, evicted = self, [], [], []
        for child in children:
            text = _essence(child)
            equal = [member.id for member in population.members if _essence(member) == text]
            if not child.render().strip():
                rejected.append((child, "empty"))
            elif equal and not duplicates:
                rejected.append((child, f"equal to {equal[0]}"))
            else:
                born = dataclasses.replace(child, id=f"p{population.created}", iteration=iteration)
                members = (*population.members, born)
                evicted.extend(members[: -self.max_size])
                population = Population(members[-self.max_size :], self.max_size, population.created + 1)
                accepted.append(born)
        return Added(population, tuple(accepted), tuple(rejected), tuple(evicted))

    def with_ratings(self, ratings: Mapping[str, tuple[float, float]]) -> Population:
        """The same members, those in `ratings` (id -> (mu, sigma)) with new ratings. Raises KeyError."""
        return self.replace(
            dataclasses.replace(self.get(member_id), mu=mu, sigma=sigma)
            for member_id, (mu, sigma) in ratings.items()
        )

    def replace(self, members: Iterable[SystemPrompt]) -> Population:
        """The same population with other versions of some members. Raises KeyError for one not alive."""
        new = {member.id: member for member in members}
        for member_id in new:
            self.get(member_id)
        return dataclasses.replace(self, members=tuple(new.get(member.id, member) for member in self.members))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` gives back an equal population, every float bit for bit.

        Raises ValueError for ratings that are not finite, TypeError for evidence that JSON cannot hold.
        """
        saved = {
            "max_size": self.max_size,
            "created": self.created,
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
    _check_fields("population", saved, {"max_size", "created", "members"})
    members = tuple(prompt_from_json(member, f"members[{i}]") for i, member in enumerate(saved["members"]))
    return Population(members, saved["max_size"], saved["created"])


def prompt_from_json(saved: dict[str, Any], where: str = "the prompt") -> SystemPrompt:
    """The system prompt whose fields were saved, tuples as lists. Raises ValueError as `from_json` does."""
    _check_fields(where, saved, {field.name for field in dataclasses.fields(SystemPrompt)})
    tuples = {name: tuple(saved[name]) for name in ("principles", "parents", "edits", "tournaments")}
    return SystemPrompt(**{**saved, **tuples})


def _essence(prompt: SystemPrompt) -> list[str]:
    """What two prompts have in common that say the same."""
    lines = (" ".join(line.split()) for line in prompt.render().splitlines())
    return [line.rstrip(" .;,:").casefold() for line in lines if line]


def _check_fields(where: str, found: dict[str, Any], expected: set[str]) -> None:
    if not isinstance(found, dict) or set(found) != expected:
        has = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{where} of the saved population has {has}, expected {sorted(expected)}")
