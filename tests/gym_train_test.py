"""A run on a task of reasoning-gym, whose feedback reaches the reflector."""

import io
import json

import pytest
from rich.console import Console

from espl_jax.run import reflection
from espl_jax.train import train
from tests.support import fakes

pytest.importorskip("reasoning_gym")

FEEDBACK = "There is no answer between tags. The answer has to be written as <answer>...</answer>."


def advice(conversations):
    """A reflector that repeats the feedback it is shown."""
    replies = []
    for conversation in conversations:
        text = conversation[-1]["content"]
        principle = f"Mind this: {FEEDBACK}" if FEEDBACK in text else "No feedback."
        replies.append(json.dumps([{"op": "add", "principle": principle}]))
    return replies


def test_feedback_becomes_a_principle(tmp_path, monkeypatch):
    fakes.take_over(monkeypatch)
    monkeypatch.setattr(reflection, "local_reflector", lambda model, **settings: advice)
    spec = "reasoning_gym:path_star:count=2,degree=2,min_path_length=2,max_path_length=2,node_range=50"
    config = fakes.config(
        mode="evolution",
        num_iterations=1,
        num_prompts=1,
        evaluation__every=0,
        evaluation__test_samples=1,
        environment__name="reasoning_gym",
        environment__answer_format="tag",
        **{f"data__{split}": spec for split in ("train", "validation", "test")},
    )
    train(config, tmp_path, Console(file=io.StringIO()))
    rollouts = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    # The run adds that a reply was cut off.
    assert all(rollout["feedback"].startswith(FEEDBACK) for rollout in rollouts)
    assert all(rollout["problem"].startswith("reasoning_gym:path_star:") for rollout in rollouts)
    members = json.loads((tmp_path / "population.json").read_text())["members"]
    assert members[1]["principles"] == [f"Mind this: {FEEDBACK}"]
