"""The templates' form, and that data cannot break out of their placeholders."""

import re

import pytest

from espl_jax.evolution.edit_replies import parse_edits
from espl_jax.evolution.edits import drop_unknown, why_not_replaced
from espl_jax.evolution.templates import load_template

VALUES = {
    "summary": {"problem": "p", "answer": "a", "attempt": "t", "taken": "k", "verdict": "v"},
    "critique": {
        "problem": "p", "answer": "a", "attempts": "t", "principles": "g", "max_edits": 2, "max_words": 32,
    },
    "revision": {"principles": "g", "candidates": "c", "suggestions": "s", "max_words": 32},
    "crossover": {"sets": "s", "max_words": 32},
    "critique_prose": {"problem": "p", "answer": "a", "attempts": "t", "instructions": "i", "max_edits": 2},
    "revision_prose": {"instructions": "i", "suggestions": "s"},
    "crossover_prose": {"sets": "s"},
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_every_placeholder_is_known(name):
    system, user, opening = load_template(name).conversation(opening=True, **VALUES[name])
    assert [system["role"], user["role"], opening["role"]] == ["system", "user", "assistant"]
    assert "$" not in system["content"] + user["content"]
    assert len(system["content"].split()) <= 180  # small models lose the thread in longer instructions
    assert load_template(name).conversation(opening=False, **VALUES[name]) == [system, user]


def test_data_is_never_read_as_a_template():
    nasty = "pay $problem and ${answer} $$ {x} {0} %s \\1 \\frac{1}{2} === system ==="
    _, user = load_template("summary").conversation(
        opening=False, **{**VALUES["summary"], "attempt": nasty, "problem": nasty}
    )
    assert user["content"].count(nasty) == 2


def test_a_missing_value_is_an_error():
    with pytest.raises(KeyError, match="sets"):
        load_template("crossover").conversation(opening=False, max_words=3)


@pytest.mark.parametrize("name", ["critique", "revision", "crossover"])
def test_worked_examples_are_valid_replies(name):
    system = load_template(name).system
    edits, drops = parse_edits(re.search(r"```json.*?```", system, re.DOTALL)[0])
    assert len(edits) == 2
    assert drops == ()
    shown = re.findall(r"^([GC]\d+)\.", system, re.MULTILINE)
    assert drop_unknown(edits, shown)[1] == ()


@pytest.mark.parametrize("name", ["critique_prose", "revision_prose", "crossover_prose"])
def test_worked_examples_of_prose_apply(name):
    system = load_template(name).system
    edits, drops = parse_edits(re.search(r"```json.*?```", system, re.DOTALL)[0])
    assert edits and drops == ()
    prose = re.search(r"Instructions:\s(.*)", system)[1]
    assert [why_not_replaced(prose, edit) for edit in edits] == [""] * len(edits)


@pytest.mark.parametrize("name", [name for name in VALUES if name != "summary"])
def test_openings_begin_the_example_reply(name):
    template = load_template(name)
    assert template.opening in template.system
