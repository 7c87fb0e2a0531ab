"""What a run records of its population: enough to compute every rating again, and to be read."""

import dataclasses
import json

import numpy as np
import pytest

from espl_jax.evolution.lineage import entry, lineage_text, members_of, recompute_ratings
from espl_jax.evolution.population import start
from espl_jax.evolution.ratings import crossover_rating, inflate, mutation_rating, rate
from espl_jax.evolution.selection import select
from espl_jax.types import SystemPrompt


def history(system, drift, iterations=25, max_size=6):
    """A scripted run: its population at the end, and the logs that it wrote."""
    rng = np.random.default_rng(0)
    population = start([SystemPrompt(text="root"), SystemPrompt(text="other", mu=27.0, sigma=3.0)], max_size)
    lineage = [entry("root", member, 0) for member in population.members]
    metrics = []
    for iteration in range(1, iterations + 1):
        prompts = select(population, 3, "softmax", rng)
        ids = list(dict.fromkeys(prompt.id for prompt in prompts))
        values = rng.integers(0, 5, len(ids)) / 100
        population = rate(population, ids, values, 0.01, system, iteration)
        parents = [population.get(member_id) for member_id in ids]
        children = []
        if iteration % 3 == 0 and len(parents) > 1:
            mu, sigma = crossover_rating(parents, 1.0)
            children.append(
                SystemPrompt(
                    text=f"x{iteration}", mu=mu, sigma=sigma, parents=tuple(ids), operator="crossover"
                )
            )
        if iteration % 4:
            mu, sigma = mutation_rating(parents[0], 2.0)
            edits = ({"op": "replace", "search": "a", "replace": "b"},)
            child = SystemPrompt(text=f"m{iteration}", mu=mu, sigma=sigma, parents=(ids[0],), edits=edits)
            children.append(dataclasses.replace(child, operator="mutation"))
        added = population.add(children, iteration)
        lineage += [entry("born", child, iteration) for child in added.accepted]
        lineage += [entry("left", member, iteration) for member in added.evicted]
        moved = drift if iteration % 5 else 0.0
        population = inflate(added.population, moved)
        tournament = {"prompts": ids, "values": values.tolist()}
        metrics.append({"iteration": iteration, "tournament": tournament, "drift_sigma": moved})
    return population, json.loads(json.dumps(lineage)), json.loads(json.dumps(metrics))


@pytest.mark.parametrize("system", ["trueskill", "openskill"])
@pytest.mark.parametrize("drift", [0.0, 0.7])
def test_every_rating_can_be_computed_again_from_the_logs(system, drift):
    population, lineage, metrics = history(system, drift)
    again = recompute_ratings(lineage, metrics, system=system, mutation_sigma=2.0)
    members = members_of(lineage, population.members)
    assert len(members) == population.created == len(again) > 15
    assert {member.id: (member.mu, member.sigma) for member in members} == again
    # Another history has other ratings.
    metrics[3]["tournament"]["values"][0] += 0.5
    assert recompute_ratings(lineage, metrics, system=system, mutation_sigma=2.0) != again


def test_evicted_members_are_kept_as_they_left():
    population, lineage, _ = history("trueskill", 0.0)
    members = {member.id: member for member in members_of(lineage, population.members)}
    left = members["p0"]
    assert "p0" not in [member.id for member in population.members]
    assert left.tournaments and left.tournaments[-1]["mu"] == left.mu
    assert all(member == members[member.id] for member in population.members)


def test_tournaments_tell_value_rank_and_rating():
    population = rate(
        start([SystemPrompt(text=t) for t in "ab"], 2), ["p1", "p0", "p1"], [0.2, 0.5, 0.6], iteration=7
    )
    first, second = population.members
    assert first.tournaments == (
        {"iteration": 7, "value": 0.5, "rank": 0, "players": 2, "mu": first.mu, "sigma": first.sigma},
    )
    assert (second.tournaments[0]["value"], second.tournaments[0]["rank"]) == (0.4, 1)


def test_the_text_says_who_came_from_whom_and_how_they_did():
    root = SystemPrompt(text="Add.", id="p0", tournaments=({"rank": 0}, {"rank": 1}))
    edits = (
        {"op": "add", "id": "C0", "principle": "Check."},
        {"op": "merge", "ids": ["G0", "C0"], "principle": "Check twice."},
        {"op": "remove", "id": "G1", "evidence": "no win"},
        {"op": "replace", "search": "", "replace": "End."},
    )
    child = SystemPrompt(
        text="Add.",
        id="p1",
        mu=28.5,
        sigma=2.0,
        parents=("p0", "p7"),
        operator="crossover",
        iteration=3,
        edits=edits,
    )
    assert lineage_text([root, child], living=["p1"], deployed="p1") == (
        "p0  root: 25.00 ± 8.33, first in 1 of 2 tournaments, left\n"
        "      Add.\n"
        "p1  crossover of p0, p7, iteration 3: 28.50 ± 2.00, never played, deployed\n"
        "      add C0: Check.\n"
        "      merge G0, C0: Check twice.\n"
        "      remove G1\n"
        "          because no win\n"
        "      append 'End.'\n"
    )
