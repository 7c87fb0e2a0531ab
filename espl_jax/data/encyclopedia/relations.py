"""Relations between pages, and the questions that follow one or several relations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from espl_jax.data.encyclopedia.world import World

MAX_HOPS = 3


@dataclasses.dataclass(frozen=True)
class Relation:
    """A relation from a page (the subject) to another page or a plain value (the object).

    Attributes:
      kinds: kinds of the pages that have the relation.
      phrase: noun phrase for an object that is a page, with `{}` for the subject; empty for plain values.
      questions: questions for the object, with `{}` for the subject.
    """

    kinds: tuple[str, ...]
    phrase: str
    questions: tuple[str, ...]


RELATIONS = {
    "author": Relation(("book",), "the author of {}", ("Who wrote {}?", "Who is the author of {}?")),
    "composer": Relation(
        ("opera",), "the composer of {}", ("Who composed {}?", "Who is the composer of {}?")
    ),
    "painter": Relation(("painting",), "the painter of {}", ("Who painted {}?", "Which painter made {}?")),
    "completed": Relation(
        ("book", "opera", "painting"),
        "",
        ("In which year was {} completed?", "{} was finished in which year?"),
    ),
    "kept": Relation(
        ("book", "opera", "painting"),
        "the city that keeps the original of {}",
        ("In which city is the original of {} kept?", "Which city keeps the original of {}?"),
    ),
    "birthplace": Relation(
        ("person",),
        "the city where {} was born",
        ("In which city was {} born?", "What is the birthplace of {}?"),
    ),
    "deathplace": Relation(
        ("person",),
        "the city where {} died",
        ("In which city did {} die?", "What is the place of death of {}?"),
    ),
    "born": Relation(("person",), "", ("In which year was {} born?", "What is the year of birth of {}?")),
    "died": Relation(("person",), "", ("In which year did {} die?", "What is the year of death of {}?")),
    "teacher": Relation(("person",), "the teacher of {}", ("Who taught {}?", "Who was the teacher of {}?")),
    "leader": Relation(
        ("event",),
        "the person who led {}",
        ("Who led {}?", "Who was the leader of {}?"),
    ),
    "venue": Relation(
        ("event",),
        "the city where {} took place",
        ("In which city did {} take place?", "Which city was the venue of {}?"),
    ),
    "held": Relation(("event",), "", ("In which year did {} take place?", "What is the year of {}?")),
    "region": Relation(
        ("city",),
        "the region around {}",
        ("In which region is {}?", "What is the region around {} called?"),
    ),
    "founded": Relation(("city",), "", ("In which year was {} founded?", "When was {} founded?")),
    "country": Relation(
        ("region",),
        "the country that {} belongs to",
        ("In which country is {}?", "To which country does {} belong?"),
    ),
    "capital": Relation(
        ("country",),
        "the capital of {}",
        ("What is the capital of {}?", "Which city is the capital of {}?"),
    ),
    "language": Relation(
        ("country",),
        "",
        ("Which language is spoken in {}?", "What is the language of {}?"),
    ),
    "currency": Relation(("country",), "", ("Which currency is used in {}?", "What is the currency of {}?")),
}
"""Name -> relation, as in `World.facts`."""


def mention(world: World, title: str) -> str:
    """Returns the title of a page as used within a sentence."""
    return f"the {title}" if world.kinds[title] == "event" else title


def chains(world: World, title: str, hops: int) -> Iterator[tuple[str, ...]]:
    """Yields the chains of `hops` relations that can be followed from a page.

    Skips chains whose question contains the answer, such as those that lead back to the page.
    """
    for chain in _paths(world, title, hops):
        answer = follow(world, title, chain)[-1]
        if all(answer.casefold() not in text.casefold() for text in questions(world, title, chain)):
            yield chain


def follow(world: World, title: str, chain: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the start page, the pages along the chain, and the answer.

    Raises:
      KeyError: if a fact does not exist.
    """
    passed = [title]
    for relation in chain:
        passed.append(world.facts[passed[-1], relation])
    return tuple(passed)


def questions(world: World, title: str, chain: tuple[str, ...]) -> list[str]:
    """Returns all wordings of the question for the last object of a chain."""
    subject = mention(world, title)
    for relation in chain[:-1]:
        subject = RELATIONS[relation].phrase.format(subject)
    texts = [text.format(subject) for text in RELATIONS[chain[-1]].questions]
    return [text[0].upper() + text[1:] for text in texts]


def _paths(world: World, title: str, hops: int) -> Iterator[tuple[str, ...]]:
    for name, relation in RELATIONS.items():
        value = world.facts.get((title, name))
        if value is None:
            continue
        if hops == 1:
            yield (name,)
        elif relation.phrase:
            for rest in _paths(world, value, hops - 1):
                yield (name, *rest)
