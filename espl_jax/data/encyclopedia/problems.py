"""A generated encyclopedia of an invented world, for search agents on machines without Wikipedia or a hub.

Its people, places, works and events do not exist, so no model knows them: what is not searched for cannot be
answered.
"""

from __future__ import annotations

import random
import re

from espl_jax.data.encyclopedia import prose, relations
from espl_jax.data.encyclopedia.world import World, make_world
from espl_jax.data.problems import ProblemSet
from espl_jax.types import Passage, Problem

SPLITS = {"train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}
"""Each split's share of the pages that questions start from, of every kind."""

DEFAULT_COUNTS = {"train": 196, "validation": 32, "test": 64}
"""Of train and test as many as the paper's search task has."""

PEOPLE = 120
"""Default number of people, which makes 325 pages."""


def passages(seed: int = 0, people: int = PEOPLE) -> tuple[Passage, ...]:
    """The pages, one passage each, in a seeded order.

    Args:
      seed: of the world; the same as for `questions`.
      people: 20 to 500; there are as many works, a third as many events, a quarter as many cities, and some
        regions and countries.

    Raises:
      ValueError: for a number of people out of range.
    """
    world = make_world(people, seed)
    titles = list(world.kinds)
    random.Random(f"pages {seed}").shuffle(titles)
    return tuple(Passage(title, prose.page(world, title, seed)) for title in titles)


def questions(
    split: str = "train",
    seed: int = 0,
    count: int | None = None,
    hops: int | str = "1-3",
    people: int = PEOPLE,
) -> ProblemSet:
    """Questions that follow facts from page to page ("In which city was the author of The Idle Kiln born?").

    Each has one right answer, which is never in the question. A page that questions start from belongs to one
    split for good, whatever count and hops, so splits never overlap. Numbers of hops take turns. A question's
    id says where it starts and what it follows: `encyclopedia-120-0.the-idle-kiln.author.birthplace` (people,
    seed, page, relations).

    Args:
      split: `train`, `validation` or `test`.
      seed: of the world, and of which questions are chosen.
      count: how many; by default 196, 32 or 64. More of them begin with the fewer.
      hops: how many facts a question follows, 1 to 3: a number, or a range such as "1-3".
      people: size of the world, see `passages`.

    Raises:
      ValueError: naming the argument and the fix.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
    fewest, most = _range(hops)
    world = make_world(people, seed)
    starts = _starts(world, split, seed)
    rng = random.Random(f"questions {split} {seed} {people}")
    shuffled = {}
    for number in range(1, relations.MAX_HOPS + 1):
        shuffled[number] = [(title, c) for title in starts for c in relations.chains(world, title, number)]
        rng.shuffle(shuffled[number])
    queues = [shuffled[number] for number in range(fewest, most + 1)]
    # One of each length in turn, for as long as there are any.
    ordered = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]
    count = DEFAULT_COUNTS[split] if count is None else count
    if not 1 <= count <= len(ordered):
        raise ValueError(
            f"count={count}: the {split} split has {len(ordered)} questions with hops={hops} and "
            f"people={people}; choose 1 to {len(ordered)}, or more people"
        )
    problems = tuple(_problem(world, title, chain, people, seed) for title, chain in ordered[:count])
    return ProblemSet(problems, f"encyclopedia of {people} people, seed {seed} ({split})")


def plan(problem_id: str) -> tuple[str, ...]:
    """The titles of the pages that lead to the answer of a question, in order, one a hop.

    The last one says the answer, each other one the title of the next: what a policy does that knows the
    encyclopedia.

    Args:
      problem_id: of a problem of `questions`.

    Raises:
      ValueError: the id is not one of those.
    """
    match = re.fullmatch(r"encyclopedia-(\d+)-(-?\d+)\.([a-z-]+)\.([a-z.]+)", problem_id)
    if match:
        world = make_world(int(match[1]), int(match[2]))
        named = [title for title in world.kinds if _slug(title) == match[3]]
        chain = tuple(match[4].split("."))
        if named and chain in relations.chains(world, named[0], len(chain)):
            return relations.follow(world, named[0], chain)[:-1]
    raise ValueError(
        f"{problem_id!r} is not the id of a question of the encyclopedia; take it from `questions`"
    )


def _range(hops: int | str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-3])(?:-([1-3]))?", str(hops))
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if fewest > most:
        raise ValueError(f"hops={hops!r}: give a number from 1 to 3, or a range such as 1-3")
    return fewest, most


def _starts(world: World, split: str, seed: int) -> list[str]:
    """The pages from which the split's questions start: its share of every kind."""
    start, stop = SPLITS[split]
    found = []
    for kind in sorted(set(world.kinds.values())):
        titles = world.titles(kind)
        random.Random(f"splits {kind} {seed}").shuffle(titles)
        found += titles[round(start * len(titles)) : round(stop * len(titles))]
    return found


def _problem(world: World, title: str, chain: tuple[str, ...], people: int, seed: int) -> Problem:
    identity = ".".join((f"encyclopedia-{people}-{seed}", _slug(title), *chain))
    text = random.Random(identity).choice(relations.questions(world, title, chain))
    return Problem(id=identity, text=text, answer=relations.follow(world, title, chain)[-1])


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")
