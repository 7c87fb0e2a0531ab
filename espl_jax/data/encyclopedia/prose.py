"""The text of pages: a few sentences per title with its facts, in randomly chosen wordings."""

from __future__ import annotations

import random

from espl_jax.data.encyclopedia.names import listed
from espl_jax.data.encyclopedia.relations import mention
from espl_jax.data.encyclopedia.world import MADE_BY, World

_FILLERS = {
    "book": (
        "Early readers praised the plain language of {title}.",
        "A second edition of {title} came with a map and a short preface.",
        "Schools still use a shortened version of {title}.",
    ),
    "opera": (
        "The overture of {title} is often played on its own.",
        "At its first performance {title} lasted more than four hours.",
        "Singers consider {title} to be among the hardest of its time.",
    ),
    "painting": (
        "Restorers found an older sketch beneath {title}.",
        "Only two colors dominate {title}.",
        "Many engravings of {title} were sold in the following decades.",
    ),
    "person": (
        "Letters show {title} as a patient and stubborn mind.",
        "A street and a small museum bear the name of {title}.",
        "{title} kept a diary for most of a long life.",
        "Friends remembered {title} for a dry sense of humor.",
    ),
    "city": (
        "The old market of {title} is known for its covered arcades.",
        "A stone bridge leads into the center of {title}.",
        "Visitors come to {title} for its gardens and its glass.",
        "Every spring a fair fills the squares of {title}.",
    ),
    "region": (
        "The hills of {title} are covered with orchards.",
        "Winters in {title} are long and dry.",
        "Wool and slate made {title} wealthy.",
        "Travelers praise the quiet roads of {title}.",
    ),
    "country": (
        "The flag of {title} shows three stars on a green field.",
        "The coast of {title} has many small islands.",
        "Most people in {title} live in towns.",
    ),
    "event": (
        "Newspapers reported on the {title} for weeks.",
        "A medal was struck in memory of the {title}.",
        "Heavy rain delayed the opening of the {title} by a day.",
    ),
}
"""Kind of page -> filler sentences, which no question asks about."""


def page(world: World, title: str, seed: int) -> str:
    """Returns the text of a page: 3 to 6 sentences, facts first.

    Args:
      world: the world.
      title: title of the page.
      seed: seed of the wording.
    """
    rng = random.Random(f"page {seed} {title}")
    kind = world.kinds[title]
    write = {"person": _person, "city": _city, "region": _region, "country": _country, "event": _event}
    sentences = write.get(kind, _work)(world, title, rng)
    fillers = rng.sample(_FILLERS[kind], len(_FILLERS[kind]))
    count = rng.randint(max(1, 3 - len(sentences)), 2)
    sentences += [text.format(title=title) for text in fillers[:count]]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def _work(world: World, title: str, rng: random.Random) -> list[str]:
    kind = world.kinds[title]
    form = {"book": "novel", "opera": "opera", "painting": "painting"}[kind]
    article = "an" if form == "opera" else "a"
    maker = world.facts[title, MADE_BY[kind]]
    year, city = world.facts[title, "completed"], world.facts[title, "kept"]
    made = {"book": "written", "opera": "composed", "painting": "painted"}[kind]
    return [
        rng.choice(
            (
                f"{title} is {article} {form} by {maker}, completed in {year}.",
                f"{title} is {article} {form} that was {made} by {maker} and finished in {year}.",
                f"In {year} {maker} completed {title}, {article} {form}.",
            )
        ),
        rng.choice(
            (
                f"The original of {title} is kept in {city}.",
                f"{city} keeps the original of {title} in its archive.",
            )
        ),
    ]


def _person(world: World, name: str, rng: random.Random) -> list[str]:
    profession, she, birthplace, born, deathplace, died = (
        world.facts[name, relation]
        for relation in ("profession", "pronoun", "birthplace", "born", "deathplace", "died")
    )
    her = {"she": "her", "he": "his"}[she]
    article = "an" if profession[0] in "aeiou" else "a"
    sentences = [
        rng.choice(
            (
                f"{name} was {article} {profession} who was born in {birthplace} in {born}.",
                f"Born in {birthplace} in {born}, {name} became known as {article} {profession}.",
                f"{name}, {article} {profession}, was born in {born} in {birthplace}.",
            )
        )
    ]
    teacher = world.facts.get((name, "teacher"))
    if teacher:
        wordings = (
            f"{she} was taught by {teacher}.",
            f"{teacher} was {her} teacher.",
            f"{her} teacher was {teacher}.",
        )
        sentences.append(rng.choice(wordings))
    works = [work for relation in MADE_BY.values() for work in world.subjects(relation, name)]
    events = world.subjects("leader", name)
    if works:
        sentences.append(f"{her} works include {listed(works[:2])}.")
    elif events:
        sentences.append(f"{she} led {mention(world, events[0])}.")
    sentences.append(
        rng.choice(
            (
                f"{name} died in {deathplace} in {died}.",
                f"{she} died in {died} in {deathplace}.",
            )
        )
    )
    return sentences


def _city(world: World, title: str, rng: random.Random) -> list[str]:
    region, year = world.facts[title, "region"], world.facts[title, "founded"]
    sentences = [
        rng.choice(
            (
                f"{title} is a city in {region} that was founded in {year}.",
                f"The city of {title} lies in {region} and was founded in {year}.",
                f"Founded in {year}, {title} is a city in {region}.",
            )
        )
    ]
    natives = world.subjects("birthplace", title)
    events = world.subjects("venue", title)
    if natives:
        sentences.append(f"{rng.choice(natives)} was born here.")
    if events:
        event = rng.choice(events)
        sentences.append(f"The {event} took place here in {world.facts[event, 'held']}.")
    return sentences


def _region(world: World, title: str, rng: random.Random) -> list[str]:
    country = world.facts[title, "country"]
    cities = world.subjects("region", title)
    return [
        rng.choice((f"{title} is a region of {country}.", f"The region of {title} belongs to {country}.")),
        f"The largest of its cities are {listed(cities[:3])}."
        if len(cities) > 1
        else f"Its city is {cities[0]}.",
    ]


def _country(world: World, title: str, rng: random.Random) -> list[str]:
    capital, regions = world.facts[title, "capital"], world.subjects("country", title)
    language, currency = world.facts[title, "language"], world.facts[title, "currency"]
    return [
        rng.choice(
            (f"{title} is a country whose capital is {capital}.", f"The capital of {title} is {capital}.")
        ),
        rng.choice(
            (
                f"The language of {title} is {language}, and its currency is the {currency}.",
                f"People in {title} speak {language} and pay with the {currency}.",
            )
        ),
        f"It is made up of {listed(regions)}.",
    ]


def _event(world: World, title: str, rng: random.Random) -> list[str]:
    leader, city, year = (world.facts[title, relation] for relation in ("leader", "venue", "held"))
    return [
        rng.choice(
            (f"The {title} took place in {city} in {year}.", f"In {year} the {title} was held in {city}.")
        ),
        rng.choice((f"It was led by {leader}.", f"{leader} led the {title}.")),
    ]
