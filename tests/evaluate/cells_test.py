"""Cells out of batches, and how they are shown."""

import dataclasses

import numpy as np
import pytest

from espl_jax.evaluate.cells import make_cells, show
from espl_jax.types import Rollouts, SystemPrompt


def batch(success, truncated=False, length=5):
    """Rollouts [M, b, N] of which only the grades matter."""
    success = np.array(success, bool)
    fields = {field.name: None for field in dataclasses.fields(Rollouts)}
    prompts = tuple(SystemPrompt(f"text {m}") for m in range(len(success)))
    return Rollouts(
        **{
            **fields,
            "prompts": prompts,
            "rewards": success.astype(np.float32),
            "success": success,
            "truncated": np.full(success.shape, truncated),
            # Tools said four more tokens, and batches are padded to widths of their own.
            "lengths": np.full(success.shape, length + 4),
            "drawn": np.broadcast_to(np.arange(length + 4) < length, (*success.shape, length + 4)),
        }
    )


BATCHES = [
    batch([[[1, 1]], [[0, 1]]], truncated=True),
    batch([[[0, 0], [0, 1]], [[0, 0], [0, 0]]], length=11),
]


def test_batches_are_joined_over_problems():
    first, second = make_cells(BATCHES, "m", ["a", "b"], "d")
    assert (first.model, first.prompt, first.data, first.system_prompt) == ("m", "a", "d", "text 0")
    assert first.evaluation.pass_at == {"1": 0.5, "2": pytest.approx(2 / 3)}
    assert second.evaluation.pass_at == {"1": pytest.approx(1 / 6), "2": pytest.approx(1 / 3)}
    assert first.evaluation.num_problems == 3 and first.truncated == pytest.approx(1 / 3)
    assert first.new_tokens == pytest.approx((5 + 11 + 11) / 3)


def test_one_cell_is_shown_in_lines():
    (cell, _) = make_cells(BATCHES, "m", ["a", "b"], "d")
    low, high = cell.evaluation.reward_interval
    assert show([cell]).splitlines() == [
        "model        m",
        "prompt       a",
        "data         d",
        "problems     3",
        f"mean reward  0.500 [{low:.3f}, {high:.3f}]",
        f"pass@1       {cell.evaluation}",
        "pass@2       66.7% [20.8, 93.9]",  # Wilson's of two in three
        "new tokens   9.0",
        "cut off      33%",
    ]


def test_several_are_a_table_under_what_they_share():
    shown = show(make_cells(BATCHES, "m", ["a", "b"], "d")).splitlines()
    assert shown[:4] == ["model        m", "data         d", "problems     3", ""]
    assert [cell.strip() for cell in shown[4].split("|")[1:4]] == ["prompt", "mean reward", "pass@1"]
    assert len(shown) == 4 + 4 and shown[6].startswith("| a") and shown[7].startswith("| b")


def test_nothing_in_common():
    one, other = make_cells(BATCHES, "m", ["a", "b"], "d")
    other = dataclasses.replace(
        other,
        model="n",
        data="e",
        evaluation=dataclasses.replace(other.evaluation, num_problems=4, reward_interval=None),
    )
    shown = show([one, other])
    assert shown.startswith("| model | prompt | data | problems |") and "0.167 [unknown]" in shown
