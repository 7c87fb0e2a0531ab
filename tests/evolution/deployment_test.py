"""Which prompt is deployed: by ratings among those that were played, the newest, or by validation."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from espl_jax.evolution.deployment import best_rated, best_validated, deployed, newest
from espl_jax.evolution.population import start
from espl_jax.types import SystemPrompt


def population_of(*members):
    """Members of these (mu, sigma, tournaments)."""
    population = start([SystemPrompt(text=f"prompt {i}") for i in range(len(members))], len(members))
    return population.replace(
        dataclasses.replace(member, mu=mu, sigma=sigma, tournaments=({},) * games)
        for member, (mu, sigma, games) in zip(population.members, members, strict=True)
    )


POPULATION = population_of((25, 3, 4), (28, 2, 1), (30, 2.5, 2), (40, 1, 0))
"""mu - 2 sigma: 19, 24, 25, 38."""


@pytest.mark.parametrize(("games", "expected"), [(0, "p3"), (1, "p2"), (2, "p2"), (3, "p0"), (4, "p0")])
def test_the_best_bound_among_those_played_enough(games, expected):
    assert best_rated(POPULATION, games).prompt.id == expected


def test_reasons_say_how_it_was_chosen():
    assert best_rated(POPULATION, 2).reason == (
        "highest mu - 2 sigma, 25.00, of the 2 members with 2 or more tournaments"
    )
    choice = best_rated(POPULATION, 9)
    assert choice.prompt.id == "p0" and choice.reason.endswith(
        "4 or more tournaments (none has the 9 asked for)"
    )
    assert newest(POPULATION) == (POPULATION.members[3], "newest of 4 members")


def test_nobody_played():
    """Ratings alone, equals to the older."""
    assert best_rated(population_of((25, 8, 0), (25, 8, 0)), 2).prompt.id == "p0"
    # 5.1 of a root that lost a game against the 8.3 of one that nobody has seen.
    assert best_rated(population_of((18.3, 6.6, 1), (25, 25 / 3, 0)), 1).prompt.id == "p0"


@pytest.mark.parametrize(
    ("mode", "rule", "expected"),
    [
        ("espl", "ratings", "p2"),
        ("evolution", "ratings", "p2"),
        ("espl", "newest", "p3"),
        ("rl", "ratings", "p0"),  # only the root was played
        ("reflection", "ratings", "p3"),  # nobody is rated, and each takes the place of the one before
    ],
)
def test_by_mode_and_rule(mode, rule, expected):
    settings = ConfigDict({"rule": rule, "min_tournaments": 2})
    assert deployed(POPULATION, mode, settings).prompt.id == expected


def test_validation_tries_the_best_the_newest_and_the_oldest_first():
    tried = []

    def validate(members):
        tried.append([member.id for member in members])
        return [{"p0": 0.5, "p1": 0.9, "p2": 0.5, "p3": 0.4}[member.id] for member in members]

    choice = best_validated(POPULATION, validate, 3)
    assert tried == [["p2", "p3", "p0"]]
    assert choice.prompt.id == "p2"  # equal to p0, and its bound is higher
    assert choice.reason == "highest mean reward on validation, 0.500, of p2 0.500, p3 0.400, p0 0.500"
    assert best_validated(POPULATION, validate, 9).prompt.id == "p1"
    assert tried[1] == ["p2", "p3", "p0", "p1"]


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="min_tournaments=-1"):
        best_rated(POPULATION, -1)
    with pytest.raises(ValueError, match="candidates=0"):
        best_validated(POPULATION, lambda members: [], 0)
