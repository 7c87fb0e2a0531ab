"""System prompts as a command line names them."""

import json

import pytest

from espl_jax.evaluate.prompts import DEFAULT, label, read_prompt
from espl_jax.evolution import population as populations
from espl_jax.types import SystemPrompt


@pytest.fixture
def population(tmp_path):
    """The path of a population of two; p1 is the best."""
    members = populations.start([SystemPrompt("Add."), SystemPrompt("Sum.", ("Twice.",))], 4)
    path = tmp_path / "population.json"
    path.write_text(json.dumps(members.with_ratings({"p1": (30.0, 1.0)}).to_json()))
    return path


def test_text_file_and_member_that_say_the_same_are_the_same_prompt(population, tmp_path):
    (tmp_path / "system_prompt.txt").write_text("Sum.\n\nG0. Twice.\n")
    given = ["Sum.\n\nG0. Twice.", str(tmp_path / "system_prompt.txt"), f"{population}#p1"]
    prompts = [read_prompt(each) for each in given]
    assert {prompt.render() for prompt in prompts} == {"Sum.\n\nG0. Twice."}
    assert len({prompt.id for prompt in prompts}) == 1
    assert read_prompt(f"{population}#p0").id != prompts[0].id


@pytest.mark.parametrize(
    "text", ["", "Use C# well.", "Write a.json and b.txt now.", "Name it\nx.txt", "#1 {}"]
)
def test_text_stays_as_it_is(text):
    assert read_prompt(text).render() == text


@pytest.mark.parametrize("text", ["   ", "\n", " \t\n"])
def test_blank_ones_are_one_prompt(text, tmp_path):
    (tmp_path / "blank.txt").write_text(text)
    assert read_prompt(text) == read_prompt("") == read_prompt(str(tmp_path / "blank.txt"))


@pytest.mark.parametrize("word", ["Add. ", "Add/"])
@pytest.mark.parametrize("end", ["a.txt", "a.json", "a.json#p1"])
def test_text_too_long_for_a_path(word, end):
    assert read_prompt(word * 2000 + end).render() == word * 2000 + end


def test_members_that_are_not_there(population):
    with pytest.raises(
        ValueError, match=r"no member 'p7'; write .*population.json#ID with one of p0, p1 .*p1"
    ):
        read_prompt(f"{population}#p7")
    with pytest.raises(ValueError, match="no member given"):
        read_prompt(str(population))


def test_files_that_are_not_there_or_not_populations(tmp_path):
    for name in ("none.txt", "none.json#p1"):
        with pytest.raises(FileNotFoundError, match=r".*none.* does not exist"):
            read_prompt(str(tmp_path / name))
    for text in ("[1]", "{", '{"members": []}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"not the population\.json of a run"):
            read_prompt(f"{tmp_path / 'other.json'}#p0")


def test_labels_are_short():
    assert label("") == DEFAULT and label("runs/x/population.json#p7") == "runs/x/population.json#p7"
    assert label("Reply\nwith the sum.") == "Reply with the sum."
    assert label("word " * 20) == "word word word word word word word wo..."
