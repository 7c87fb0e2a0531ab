"""The facts of the encyclopedia (who made what, where and when), drawn so that they are consistent."""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
from collections.abc import Mapping

from espl_jax.data.encyclopedia.names import Names

MAKERS = {"writer": "book", "composer": "opera", "painter": "painting"}
"""Profession -> kind of work that its members make."""

PROFESSIONS = (*MAKERS, "engineer", "physician")

MADE_BY = {"book": "author", "opera": "composer", "painting": "painter"}
"""Kind of work -> relation to its maker."""

MIN_PEOPLE, MAX_PEOPLE = 20, 500


@dataclasses.dataclass(frozen=True)
class World:
    """All facts.

    A subject has at most one object per relation, so a question that follows relations from a title has a
    single answer.

    Attributes:
      kinds: title of a page -> its kind: `book`, `opera`, `painting`, `person`, `event`, `city`,
        `region` or `country`.
      facts: (title, name of a relation) -> title of another page, or a plain value.
    """

    kinds: Mapping[str, str]
    facts: Mapping[tuple[str, str], str]

    def titles(self, kind: str) -> list[str]:
        """Returns the titles of a kind, in order."""
        return [title for title, of in self.kinds.items() if of == kind]

    def subjects(self, relation: str, value: str) -> list[str]:
        """Returns the titles for which the relation has this value, in order."""
        return self._subjects.get((relation, value), [])

    @functools.cached_property
    def _subjects(self) -> dict[tuple[str, str], list[str]]:
        found = collections.defaultdict(list)
        for (title, relation), value in self.facts.items():
            found[relation, value].append(title)
        return dict(found)


@functools.lru_cache(maxsize=4)
def make_world(people: int, seed: int) -> World:
    """Draws a world: as many works as people, a third as many events, a quarter as many cities.

    Cities belong to regions and regions to countries; the capital of a country is one of its cities. People
    are born from 1700 to 1880 and live 50 to 88 years. They make works and lead events from the age of 22 on.
    Their teachers have the same profession, are 20 to 45 years older, and live until the pupil is 18.

    Raises:
      ValueError: for a number of people out of range.
    """
    if not MIN_PEOPLE <= people <= MAX_PEOPLE:
        raise ValueError(f"people={people}: must be from {MIN_PEOPLE} to {MAX_PEOPLE}")
    rng = random.Random(f"encyclopedia {people} {seed}")
    names = Names(rng)
    facts: dict[tuple[str, str], str] = {}
    places = _add_places(facts, people, names, rng)
    persons = _add_people(facts, people, names, places["city"], rng)
    works = _add_works(facts, people, names, persons, places["city"], rng)
    events = _add_events(facts, people // 3, names, persons, places["city"], rng)
    kinds = {name: kind for kind, named in places.items() for name in named}
    kinds |= dict.fromkeys(persons, "person") | works | dict.fromkeys(events, "event")
    return World(kinds, facts)


def _add_places(
    facts: dict[tuple[str, str], str], people: int, names: Names, rng: random.Random
) -> dict[str, list[str]]:
    countries = names.words("country", max(2, people // 24))
    regions = names.words("region", 2 * len(countries))
    cities = names.words("city", max(people // 4, len(regions)))
    for i, region in enumerate(regions):
        facts[region, "country"] = countries[i % len(countries)]
    for i, city in enumerate(cities):
        facts[city, "region"] = regions[i % len(regions)]
        facts[city, "founded"] = str(rng.randint(900, 1500))
    languages, currencies = names.words("language", len(countries)), names.words("currency", len(countries))
    for country, language, currency in zip(countries, languages, currencies, strict=True):
        inside = [city for city in cities if facts[facts[city, "region"], "country"] == country]
        facts[country, "capital"] = rng.choice(inside)
        facts[country, "language"] = language
        facts[country, "currency"] = currency.lower()
    return {"country": countries, "region": regions, "city": cities}


def _add_people(
    facts: dict[tuple[str, str], str], count: int, names: Names, cities: list[str], rng: random.Random
) -> list[str]:
    persons = names.people(count)
    for i, person in enumerate(persons):
        born = rng.randint(1700, 1880)
        birthplace, deathplace = rng.sample(cities, 2)
        facts[person, "profession"] = PROFESSIONS[i % len(PROFESSIONS)]
        facts[person, "pronoun"] = rng.choice(("she", "he"))
        facts[person, "birthplace"], facts[person, "born"] = birthplace, str(born)
        facts[person, "deathplace"], facts[person, "died"] = deathplace, str(born + rng.randint(50, 88))

    def year(person: str, relation: str) -> int:
        return int(facts[person, relation])

    for pupil in persons:
        teachers = [
            person
            for person in persons
            if facts[person, "profession"] == facts[pupil, "profession"]
            and 20 <= year(pupil, "born") - year(person, "born") <= 45
            and year(person, "died") >= year(pupil, "born") + 18
        ]
        if teachers:
            facts[pupil, "teacher"] = rng.choice(teachers)
    return persons


def _add_works(
    facts: dict[tuple[str, str], str],
    count: int,
    names: Names,
    persons: list[str],
    cities: list[str],
    rng: random.Random,
) -> dict[str, str]:
    """Returns title -> kind."""
    makers = [person for person in persons if facts[person, "profession"] in MAKERS]
    kinds = {}
    for title in names.works(count):
        maker = rng.choice(makers)
        kinds[title] = MAKERS[facts[maker, "profession"]]
        facts[title, MADE_BY[kinds[title]]] = maker
        facts[title, "completed"] = _year_of_life(facts, maker, rng)
        facts[title, "kept"] = rng.choice(cities)
    return kinds


def _add_events(
    facts: dict[tuple[str, str], str],
    count: int,
    names: Names,
    persons: list[str],
    cities: list[str],
    rng: random.Random,
) -> list[str]:
    kinds = ("Congress", "Exhibition", "Regatta", "Tournament")
    events = [f"{word} {kinds[i % len(kinds)]}" for i, word in enumerate(names.words("event", count))]
    for event in events:
        leader = rng.choice(persons)
        facts[event, "leader"] = leader
        facts[event, "held"] = _year_of_life(facts, leader, rng)
        facts[event, "venue"] = rng.choice(cities)
    return events


def _year_of_life(facts: Mapping[tuple[str, str], str], person: str, rng: random.Random) -> str:
    """Returns a year in which the person is alive and at least 22."""
    return str(rng.randint(int(facts[person, "born"]) + 22, int(facts[person, "died"])))
