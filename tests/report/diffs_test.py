"""Word-level differences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.report.diffs import prompt_diff, word_diff
from espl_jax.types import SystemPrompt


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("", "", []),
        ("one two", "one two", [("=", "one two")]),
        ("", "one", [("+", "one")]),
        ("one two three", "one 2 three", [("=", "one "), ("-", "two "), ("+", "2 "), ("=", "three")]),
        ("one\ntwo", "one\nnew\ntwo", [("=", "one\n"), ("+", "new\n"), ("=", "two")]),
    ],
)
def test_words(old, new, parts):
    assert word_diff(old, new) == parts


@given(st.text(alphabet="ab \n<", max_size=30), st.text(alphabet="ab \n<", max_size=30))
def test_parts_are_the_two_texts(old, new):
    parts = word_diff(old, new)
    assert "".join(text for kind, text in parts if kind != "+") == old
    assert "".join(text for kind, text in parts if kind != "-") == new


def test_prompts_are_compared_without_numbers_of_principles():
    old = SystemPrompt("Sum.", ("First.", "Second."))
    new = SystemPrompt("Sum.", ("Second.",))
    assert prompt_diff(old, new) == [("=", "Sum.\n"), ("-", "First.\n"), ("=", "Second.")]
