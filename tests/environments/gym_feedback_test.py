"""Where a path through a star graph breaks, by hand."""

import pytest

from espl_jax.environments.gym_feedback import path_star

QUESTION = """Example:
|1 2|1 3|2 4|3 5/1 5 = 1 3 5

Solve the following task:
|7 30|5 12|5 7|12 9/{ends} = 
"""
FORWARD = {"question": QUESTION.format(ends="5 30"), "metadata": {"center": 5}}
BACKWARD = {"question": QUESTION.format(ends="30 5"), "metadata": {"center": 5}}


@pytest.mark.parametrize(
    ("answer", "feedback"),
    [
        ("5 7 30", ""),
        ("  5\n7  30 ", ""),
        ("7 30", "The path has to begin at node 5."),
        ("1 3 5", "The path has to begin at node 5."),
        ("5 7 12", "There is no edge from 7 to 12 (step 2)."),
        ("5 12 9 30", "There is no edge from 9 to 30 (step 3)."),
        ("5 30", "There is no edge from 5 to 30 (step 1)."),
        ("5 5 7 30", "There is no edge from 5 to 5 (step 1)."),
        ("5 7 5 7 30", "There is no edge from 7 to 5 (step 2)."),
        ("5 7 44", "There is no node 44 in the graph (step 2)."),
        ("5 07 30", "There is no node 07 in the graph (step 1)."),
        ("5 12 9", "The path ends at 9, not at the target."),
        ("5 7", "The path ends at 7, not at the target."),
        ("5", "The path ends at 5, not at the target."),
        ("5, 7, 30", "'5,' is no node. The answer is a sequence of nodes, separated by single spaces."),
        ("5 -> 7", "'->' is no node. The answer is a sequence of nodes, separated by single spaces."),
        ("٥ 7", "'٥' is no node. The answer is a sequence of nodes, separated by single spaces."),
    ],
)
def test_forward(answer, feedback):
    assert path_star(answer, FORWARD) == feedback


@pytest.mark.parametrize(
    ("answer", "feedback"),
    [
        ("30 7 5", ""),
        ("5 7 30", "The path has to begin at node 30."),
        ("30 12 5", "There is no edge from 30 to 12 (step 1)."),
        ("30 7", "The path ends at 7, not at the target."),
    ],
)
def test_backward(answer, feedback):
    assert path_star(answer, BACKWARD) == feedback


def test_long_answers_are_cut():
    assert len(path_star("9" * 5000 + "x", FORWARD)) < 200
    assert len(path_star("5 " + "9" * 5000, FORWARD)) < 200
