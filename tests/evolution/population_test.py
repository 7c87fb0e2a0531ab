"""Ids, entry and exit of members, the deployed prompt, and the form on disk."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import pytest

from espl_jax.evolution.population import Population, from_json, start
from espl_jax.types import SystemPrompt


def prompts(*texts, **fields):
    return [SystemPrompt(text=text, **fields) for text in texts]


def test_start_numbers_the_roots():
    population = start(prompts("", "Think."), max_size=5)
    assert [member.id for member in population.members] == ["p0", "p1"]
    assert population.created == 2
    assert population.get("p1").text == "Think."
    assert population.get("p0").operator == "root"


@pytest.mark.parametrize(
    ("roots", "max_size", "message"),
    [
        ([], 3, "at least one"),
        (prompts("a", "a"), 3, "same prompt"),
        (prompts("a", "b"), 1, "raise max_size"),
    ],
)
def test_start_refuses(roots, max_size, message):
    with pytest.raises(ValueError, match=message):
        start(roots, max_size)


def test_add_gives_ids_in_order_and_the_oldest_leave_first():
    population = start(prompts(""), max_size=3)
    added = population.add(prompts("a", "b"), iteration=4)
    assert [child.id for child in added.accepted] == ["p1", "p2"]
    assert all(child.iteration == 4 for child in added.accepted)
    population = added.population.add(prompts("c"), iteration=5).population
    assert [member.id for member in population.members] == ["p1", "p2", "p3"]
    assert [member.id for member in population.newest(2)] == ["p2", "p3"]
    assert population.newest(10) == population.members
    with pytest.raises(KeyError, match="p0"):
        population.get("p0")


def test_add_rejects_empty_and_equal_children_and_says_why():
    population = start([SystemPrompt(text="", principles=("Check.",))], max_size=9)
    children = [
        SystemPrompt(),
        SystemPrompt(principles=("Check.",)),
        SystemPrompt(principles=("Think.",)),
        SystemPrompt(text="G0. Think."),  # renders as the child before it
        SystemPrompt(text="Prose alone is content."),
    ]
    added = population.add(children, iteration=1)
    assert [child.id for child in added.accepted] == ["p1", "p2"]
    assert [reason for _, reason in added.rejected] == ["empty", "equal to p0", "equal to p1"]
    assert [child for child, _ in added.rejected] == [children[0], children[1], children[3]]


def test_ids_are_never_given_twice():
    population = start(prompts("r"), max_size=1)
    for i in range(4):
        population = population.add(prompts(f"child {i}"), iteration=i).population
    assert [member.id for member in population.members] == ["p4"]


def test_who_has_to_leave_is_named():
    population = start(prompts("a", "b"), max_size=2)
    added = population.add(prompts("c", "a", "d", "e"), iteration=1)
    assert [member.id for member in added.population.members] == ["p4", "p5"]
    assert [member.id for member in added.evicted] == ["p0", "p1", "p2", "p3"]
    assert added.evicted[:2] == population.members


def test_prompts_that_say_the_same_are_duplicates():
    population = start([SystemPrompt(text="Be brief.", principles=("Check  it.",))], max_size=9)
    child = SystemPrompt(text="be brief", principles=("Check it",))
    assert population.add([child], 1).rejected == ((child, "equal to p0"),)
    assert [member.id for member in population.add([child], 1, duplicates=True).accepted] == ["p1"]
    assert population.add([SystemPrompt(text="Be brief!", principles=("Check it",))], 1).accepted


def test_members_are_replaced_in_their_places():
    population = start(prompts("a", "b"), max_size=2)
    other = dataclasses.replace(population.get("p0"), mu=30.0)
    assert population.replace([other]).members == (other, population.get("p1"))
    with pytest.raises(KeyError, match="p7"):
        population.replace([dataclasses.replace(other, id="p7")])


@hypothesis.given(
    st.lists(
        st.builds(
            SystemPrompt,
            text=st.text(st.characters(codec="utf-8")),
            principles=st.lists(st.text(st.characters(codec="utf-8"))).map(tuple),
            mu=st.floats(allow_nan=False, allow_infinity=False),
            sigma=st.floats(min_value=0, allow_infinity=False),
            evidence=st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers()),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda prompt: prompt.render(),
    )
)
def test_json_round_trip_is_exact(roots):
    population = start(roots, max_size=4)
    population = population.with_ratings({"p0": (0.1 + 0.2, 1 / 3)})
    assert from_json(json.loads(json.dumps(population.to_json()))) == population


def test_lineage_survives_the_round_trip():
    child = SystemPrompt(
        principles=("x",), parents=("p0",), operator="mutation", edits=({"op": "add", "principle": "x"},)
    )
    population = start(prompts(""), 3).add([child], 7).population
    again = from_json(population.to_json())
    assert again == population
    assert again.get("p1").edits == ({"op": "add", "principle": "x"},)
    assert isinstance(again.get("p1").parents, tuple)
    assert start(again.members, 3).get("p1").operator == "root"


def test_from_json_names_what_is_wrong():
    saved = start(prompts(""), 3).to_json()
    with pytest.raises(ValueError, match="created"):
        from_json({name: value for name, value in saved.items() if name != "created"})
    saved["members"][0]["colour"] = "red"
    with pytest.raises(ValueError, match=r"members\[0\].*colour"):
        from_json(saved)


def test_json_refuses_ratings_that_are_not_finite():
    population = start(prompts(""), 3).with_ratings({"p0": (float("nan"), 1.0)})
    with pytest.raises(ValueError):
        population.to_json()


def test_ids_must_be_unique():
    with pytest.raises(ValueError, match="unique"):
        Population((dataclasses.replace(SystemPrompt(), id="p0"),) * 2, 3, 1)
