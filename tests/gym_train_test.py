"""A run on a task of reasoning-gym, whose feedback reaches the reflector."""

import io
import json

import pytest
from rich.console import Console

from espl_jax.run import reflection
from espl_jax.train import train
from tests.conftest import run_module
from tests.support import fakes
from tests.support.devices import xla_flags
from tests.train_test import lines, outcome

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


STARS = "reasoning_gym:path_star:count=2,degree=2,min_path_length=2,max_path_length=2,node_range=50"


def run(folder, **changes):
    config = fakes.config(
        num_prompts=1,
        evaluation__every=0,
        evaluation__test_samples=1,
        environment__name="reasoning_gym",
        environment__answer_format="tag",
        **{f"data__{split}": STARS for split in ("train", "validation", "test")},
        **changes,
    )
    train(config, folder, Console(file=io.StringIO()))


@pytest.fixture
def tiny(monkeypatch):
    fakes.take_over(monkeypatch)
    monkeypatch.setattr(reflection, "local_reflector", lambda model, **settings: advice)


def test_feedback_becomes_a_principle(tiny, tmp_path):
    run(tmp_path, mode="evolution", num_iterations=1)
    rollouts = lines(tmp_path, "rollouts")
    # The run adds that a reply was cut off.
    assert all(rollout["feedback"].startswith(FEEDBACK) for rollout in rollouts)
    assert all(rollout["problem"].startswith("reasoning_gym:path_star:") for rollout in rollouts)
    members = json.loads((tmp_path / "population.json").read_text())["members"]
    assert members[1]["principles"] == [f"Mind this: {FEEDBACK}"]


def test_a_killed_run_on_star_graphs_resumes_bit_for_bit(tiny, tmp_path):
    """Entries are generated again from their ids, and feedback from the replies."""
    run(tmp_path / "whole", mode="espl", num_iterations=3)
    with fakes.killed_before_saving(iteration=2):
        run(tmp_path / "parts", mode="espl", num_iterations=3)
    run(tmp_path / "parts", mode="espl", num_iterations=3)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


TEN = (
    *("basic_arithmetic", "calendar_arithmetic", "count_bits", "gcd", "leg_counting"),
    *("number_sorting", "path_star", "propositional_logic", "spell_backward", "time_intervals"),
)


@pytest.mark.slow(minutes=5)
def test_ten_tasks_with_smollm2(tmp_path):
    """Prompts evolve and weights learn on ten kinds of problems at once, on one device."""
    data = {
        split: " + ".join(f"reasoning_gym:{name}:count=1,seed={seed}" for name in TEN)
        for seed, split in enumerate(("train", "validation", "test"))
    }
    fields = {f"data.{split}": spec for split, spec in data.items()}
    fields |= {"environment.name": "reasoning_gym", "environment.answer_format": "boxed"}
    fields |= {
        "num_iterations": 1,
        "num_prompts": 2,
        "batch_size": 10,
        "group_size": 2,
        "sampling.max_new_tokens": 16,
    }
    done = run_module(
        "espl_jax.main",
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
        seconds=1200,
        XLA_FLAGS=xla_flags(1),
    )
    assert done.returncode == 0, done.stderr
    rollouts = lines(tmp_path, "rollouts")
    assert len(rollouts) == 2 * 10 * 2
    assert {rollout["problem"].split(":")[1] for rollout in rollouts} == {*TEN}
    assert all(rollout["success"] or rollout["feedback"] for rollout in rollouts)
    assert len(lines(tmp_path, "evaluations")) >= 2 * 10
