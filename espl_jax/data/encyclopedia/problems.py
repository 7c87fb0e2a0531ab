"""A generated encyclopedia of an invented world, for search agents without access to Wikipedia or the Hub.

Its people, places, works and events do not exist, so a model cannot answer the questions without searching.
"""

from __future__ import annotations

import random
import re

from espl_jax.data.encyclopedia import prose, relations
from espl_jax.data.encyclopedia.world import World, make_world
from espl_jax.data.problems import ProblemSet
from espl_jax.types import Passage, Problem

SPLITS = {"train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}
"""Range of each split, as fractions of the pages of every kind that questions start from."""

DEFAULT_COUNTS = {"train": 196, "validation": 32, "test": 64}
"""Default number of questions; train and test as in the paper's search task."""

PEOPLE = 120
"""Default number of people; gives 325 pages."""


def passages(seed: int = 0, people: int = PEOPLE) -> tuple[Passage, ...]:
    """Returns the pages, one passage each, in a seeded order.

    Args:
      seed: seed of the world; use the same as for `questions`.
      people: 20 to 500. The world also has as many works, a third as many events, a quarter as many cities,
        and some regions and countries.

    Raises:
      ValueError: if the number of people is out of range.
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
    """Returns multi-hop questions ("In which city was the author of The Idle Kiln born?").

    Each question has one correct answer, which is never part of the question. Each start page belongs to the
    same split for every count and hops, so splits never overlap. Questions cycle through the numbers of hops.
    The id of a question encodes its start page and relations:
    `encyclopedia-120-0.the-idle-kiln.author.birthplace` (people, seed, page, relations).

    Args:
      split: `train`, `validation` or `test`.
      seed: seed of the world and of the choice of questions.
      count: number of questions; by default 196, 32 or 64. A smaller set is a prefix of a larger one.
      hops: facts that a question chains, 1 to 3: a number, or a range such as "1-3".
      people: size of the world; see `passages`.

    Raises:
      ValueError: with the argument and the fix.
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
    # Cycle through the numbers of hops until all questions are used.
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
    """Returns the titles of the pages that lead to the answer of a question, in order, one per hop.

    Each page names the next, and the last one has the answer; an ideal policy searches for these titles.

    Args:
      problem_id: id of a problem of `questions`.

    Raises:
      ValueError: if there is no such question.
    """
    match = re.fullmatch(r"encyclopedia-(\d+)-(-?\d+)\.([a-z-]+)\.([a-z.]+)", problem_id)
    if match:
        world = make_world(int(match[1]), int(match[2]))
        named = [title for title in world.kinds if _slug(title) == match[3]]
        chain = tuple(match[4].split("."))
        if named and chain in relations.chains(world, named[0], len(chain)):
            return relations.follow(world, named[0], chain)[:-1]
    raise ValueError(f"{problem_id!r} is not the id of an encyclopedia question; use an id from `questions`")


def _range(hops: int | str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-3])(?:-([1-3]))?", str(hops))
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if fewest > most:
        raise ValueError(f"hops={hops!r}: must be a number from 1 to 3, or a range such as 1-3")
    return fewest, most


def _starts(world: World, split: str, seed: int) -> list[str]:
    """Returns the start pages of a split: its share of the pages of every kind."""
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
