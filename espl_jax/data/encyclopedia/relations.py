"""What can be asked: relations between pages, and the questions that follow one or several of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from espl_jax.data.encyclopedia.world import World

MAX_HOPS = 3


@dataclasses.dataclass(frozen=True)
class Relation:
    """One step from a page to what it says.

    Attributes:
      kinds: of the pages that say it.
      phrase: names the object if that is a page, with the subject for `{}`; empty for plain values.
      questions: ask for the object.
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
    """A page's title as it stands within a sentence."""
    return f"the {title}" if world.kinds[title] == "event" else title


def chains(world: World, title: str, hops: int) -> Iterator[tuple[str, ...]]:
    """The relations that can be followed from a page, so many in a row.

    A chain whose answer its own question says is left out, such as one that leads back to the page.
    """
    for chain in _paths(world, title, hops):
        answer = follow(world, title, chain)[-1]
        if all(answer.casefold() not in text.casefold() for text in questions(world, title, chain)):
            yield chain


def follow(world: World, title: str, chain: tuple[str, ...]) -> tuple[str, ...]:
    """The page, the pages that the relations lead to one after the other, and the answer at the end.

    Raises:
      KeyError: there is no such fact.
    """
    passed = [title]
    for relation in chain:
        passed.append(world.facts[passed[-1], relation])
    return tuple(passed)


def questions(world: World, title: str, chain: tuple[str, ...]) -> list[str]:
    """The question for the last object of a chain, in its wordings."""
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
