import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.text.thinking import strip_thinking

plain = st.text(alphabet="ab \n<>/think", max_size=30).filter(lambda t: "think>" not in t)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("no thinking  \n", "no thinking  \n"),
        ("<think>\nhm\n</think>\n\n85", "85"),
        ("first <think>hm</think> then <think>ha</think> 85", "first  then  85"),
        ("hm, let me see\n</think>\n\n85", "85"),
        ("hm </think> 85 <think>again", "85"),
        ("85 <think>but what if", "85"),
        ("<think>what", ""),
        ("<think>a <think>b</think> c</think> 85", "85"),
        ("hm </think> 85 <think>sure?</think>", "85"),
        ("</think>", ""),
        ("", ""),
    ],
)
def test_hand_written(text, rest):
    assert strip_thinking(text) == rest


@given(plain, plain, plain)
def test_only_the_thought_is_lost(before, thought, after):
    assert strip_thinking(f"{before} <think>{thought}</think> {after}") == f"{before}  {after}".strip()
    assert strip_thinking(f"{thought}</think>{after}") == after.strip()
    assert strip_thinking(f"{before}<think>{thought}") == before.strip()
    assert strip_thinking(before) == before


def test_many_open_tags_are_fast():
    start = time.monotonic()
    assert strip_thinking("<think>" * 200_000) == ""
    assert strip_thinking("<think>" * 200_000 + "</think>85" + "<think>" * 200_000) == "85"
    assert time.monotonic() - start < 5
