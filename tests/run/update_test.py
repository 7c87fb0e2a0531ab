"""One iteration's updates inside of a run: several of them, and those that are left out."""

import functools
import io
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from configs import common
from espl_jax.console.progress import Progress
from espl_jax.run import parts as run_parts
from espl_jax.run import reflection, update
from espl_jax.run.job import Job
from espl_jax.train import train
from espl_jax.training.optimizer import make_optimizer
from espl_jax.types import TrainBatch
from tests.support import fakes

optimizer = functools.cache(make_optimizer)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    fakes.take_over(monkeypatch)
    monkeypatch.setattr(run_parts, "make_optimizer", optimizer)
    monkeypatch.setattr(reflection, "local_reflector", lambda model, **_: fakes.scripted_replies)


def run(path, **changes):
    shown = io.StringIO()
    changes = {"mode": "rl", "evaluation__every": 0, "data__test": ""} | changes
    train(fakes.config(**changes), path, Console(file=shown, width=300))
    return shown.getvalue()


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def failing(monkeypatch, iterations):
    """Steps of these numbers, from 1, meet a NaN in their batch; the real step leaves them out."""
    step, count = update.policy_gradient_step, [0]

    def poisoned(state, frozen, reference, batch, *args, **kwargs):
        count[0] += 1
        if count[0] in iterations:
            batch = batch._replace(advantages=jnp.full_like(batch.advantages, jnp.nan))
        return step(state, frozen, reference, batch, *args, **kwargs)

    monkeypatch.setattr(update, "policy_gradient_step", poisoned)


def test_epochs_and_minibatches_are_updates_each(tmp_path):
    run(tmp_path, loss__epochs=2, loss__minibatches=2, loss__kind="ppo", num_iterations=1)
    (record,) = metrics(tmp_path)
    assert record["updates"] == 4 and record["not_finite"] == 0
    # Ratios are to the weights before the first of them, and one in that one alone.
    assert record["ratio"] != 1 and record["ratio"] == pytest.approx(1, abs=0.2)
    assert 0 <= record["clip_fraction"] <= 1 and record["log_ratio_abs"] > 0


@pytest.mark.parametrize("rows", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_trainer_logprobs_are_those_of_the_weights_before_the_update(rows, tmp_path):
    changes = {"logs__trainer_logprobs": True, "loss__microbatch_rows": rows}
    run(tmp_path, mode="espl", num_iterations=2, **changes)
    records = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len({tuple(each["tokens"]) for each in records}) > len(records) // 2
    for each in records:
        assert len(each["logprobs"]) == len(each["tokens"])
        np.testing.assert_allclose(each["trainer_logprobs"], each["logprobs"], atol=2e-4)


def test_trainer_logprobs_need_a_trainer(tmp_path):
    run(tmp_path, mode="evolution", num_iterations=1, logs__trainer_logprobs=True, logs__token_logprobs=False)
    assert '"logprobs"' not in (tmp_path / "rollouts.jsonl").read_text()
    assert '"trainer_logprobs"' not in (tmp_path / "rollouts.jsonl").read_text()


@pytest.mark.parametrize(
    ("fields", "batches", "scored"),
    [
        ({"kind": "gspo"}, 1, False),
        ({"kind": "gspo", "minibatches": 2}, 2, True),
        ({"kind": "gspo", "minibatches": 2}, 1, True),  # one program, whichever minibatches have a gradient
        ({"kind": "cispo", "epochs": 2}, 1, True),
        ({"epochs": 2}, 2, False),
        ({"epochs": 2, "sampler_weight_cap": 2.0}, 1, True),
    ],
    ids=str,
)
def test_old_logprobs_are_computed_where_an_update_reads_them(fields, batches, scored, monkeypatch):
    """Once for each batch before the first of several updates; never for ratios to the sampler."""
    c = common.get_config()
    c.loss.update(fields)
    mask = np.array([[True, True, False], [True, False, False]])
    given = [TrainBatch(*[None] * 12, num_rollouts=n, num_tokens=n) for n in range(batches)]
    given = [batch._replace(mask=mask) for batch in given]
    seen = []

    def step(state, batch, **settings):
        seen.append((batch.num_rollouts, batch.old_logprobs))
        return SimpleNamespace(trainable=state.trainable + 1), {"loss": 0.0, "skipped": 0.0}

    def score(trainable, frozen, batch, config, **settings):
        return trainable, batch.num_rollouts

    monkeypatch.setattr(update, "_batches", lambda *_: given)
    monkeypatch.setattr(update, "place_batch", lambda batch, mesh: batch)
    monkeypatch.setattr(update, "batch_logprobs", score)
    monkeypatch.setattr(update, "policy_gradient_step", step)

    parts = SimpleNamespace(
        mesh=None,
        frozen=None,
        reference=SimpleNamespace(config=None),
        objective=run_parts.objective_of(c),
        step_arguments=lambda state, batch: (state, batch),
    )
    rollouts = SimpleNamespace(slots=dict, problems=())
    progress = Progress(1, append=None, console=Console(file=io.StringIO()))
    untrained = SimpleNamespace(trainable=0)
    job = Job(c, parts, None, progress)
    state, record = update.update(job, untrained, rollouts, 1)
    assert record["updates"] == state.trainable == c.loss.epochs * batches
    assert record["trained_tokens"] == 3 * c.loss.epochs * batches
    expected = [(n, (0, n) if scored else None) for n in range(batches)]
    assert seen == expected * c.loss.epochs


def test_sampler_weights_are_one_where_trainer_and_sampler_agree(tmp_path):
    run(tmp_path, loss__sampler_weight_cap=2.0, num_iterations=1)
    (record,) = metrics(tmp_path)
    assert record["sampler_weight"] == pytest.approx(1, abs=1e-4)
    assert record["ratio"] == pytest.approx(1, abs=1e-4)


def test_an_update_that_is_not_finite_is_left_out_and_said(tmp_path, monkeypatch):
    failing(monkeypatch, {2})
    said = run(tmp_path, num_iterations=3)
    first, second, third = metrics(tmp_path)
    assert [r["not_finite"] for r in (first, second, third)] == [0, 1, 0]
    assert [r["not_finite_in_row"] for r in (first, second, third)] == [0, 1, 0]
    assert second["updates"] == 0 and "loss" not in second and third["updates"] == 1
    line = next(line for line in said.splitlines() if line.startswith("Iteration 2: 1 of 1 updates skipped"))
    assert "Prompts: p0." in line and "Problems: " in line
    # The others were taken, from where the first one left the weights.
    assert np.isfinite(third["loss"]) and third["grad_norm"] > 0


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_with_its_state_saved(tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        failing(context, {2, 3, 4, 5})
        with pytest.raises(
            RuntimeError, match=r"optimizer.max_skipped=1: 2 consecutive updates .*iteration 3"
        ):
            run(tmp_path, num_iterations=6, optimizer__max_skipped=1, checkpoint_every=5)
    assert len(metrics(tmp_path)) == 3
    run(tmp_path, num_iterations=6, optimizer__max_skipped=9, checkpoint_every=5)
    assert [record["not_finite"] for record in metrics(tmp_path)] == [0, 1, 1, 0, 0, 0]
