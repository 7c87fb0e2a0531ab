"""Routing metrics by hand, and the sampler's choices of experts in the trainer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.models.config import Experts
from espl_jax.models.experts import Routing
from espl_jax.rl.routing import LOAD, load_metrics, routing_sums
from espl_jax.training.batches import train_batches
from tests.support import fakes, tiny
from tests.support.flat import collect_rollouts, compiled_gradients

CONFIG = fakes.CONFIG.replace(family="qwen3_moe", qk_norm=True, experts=Experts(5, 2, 24))


def test_sums_by_hand():
    """One layer, one row of three tokens, of which two count."""
    choices = jnp.array([[[[0, 1], [2, 1], [3, 3]]]])
    routing = Routing(choices, choices, None, jnp.array([[[0.5, 1.0, 9.0]]]))
    mask = jnp.array([[True, True, False]])
    sampler = jnp.array([[[[1, 0]], [[0, 1]], [[0, 0]]]])
    sums = routing_sums(routing, 4, mask, sampler)
    assert float(sums["router_entropy"]) == 1.5
    np.testing.assert_array_equal(sums[LOAD], [[1, 2, 1, 0]])
    assert float(sums["routing_disagreements"]) == 0.5  # one of the two choices of the second token
    unknown = routing_sums(routing, 4, mask, -jnp.ones_like(sampler))
    assert float(unknown["routing_disagreements"]) == 0
    load = load_metrics(sums[LOAD] / 2, active=2)
    assert (float(load["expert_load_max"]), float(load["expert_load_min"])) == (2, 0)


@pytest.fixture(scope="module")
def model():
    loaded = fakes.model()
    return dataclasses.replace(loaded, params=tiny.params(CONFIG), config=CONFIG)


@pytest.fixture(scope="module")
def batch(model):
    """Of conversations whose rows lose their slots, and whose turns are cut back at stop strings."""
    settings = {"key": jax.random.key(7), "group_size": 3, "max_new_tokens": 48, "max_rows": 2}
    settings |= {"stop_strings": ("e", "1"), "record_routing": True}
    given = model, fakes.PROMPTS, fakes.PROBLEMS, fakes.Talker()
    rollouts = collect_rollouts(*given, **settings)
    assert rollouts.routing.shape == (*rollouts.tokens.shape, 2, 2)
    assert rollouts.drawn.sum() < rollouts.lengths.sum()
    assert ((rollouts.routing >= 0).all((-1, -2)) == rollouts.drawn).all()
    assert ((rollouts.routing < 0).all((-1, -2)) == ~rollouts.drawn).all()
    (batch,) = train_batches(rollouts, np.ones(rollouts.rewards.shape, np.float32))
    return batch


def scored(model, batch, **settings):
    return compiled_gradients(model.params, None, None, batch, CONFIG, **settings)


def test_the_trainer_chooses_as_the_sampler_did(model, batch):
    grads, metrics = scored(model, batch)
    assert float(metrics["routing_disagreements"]) == 0
    assert 0 <= float(metrics["expert_load_min"]) < 1 < float(metrics["expert_load_max"]) <= 5 / 2
    assert 0 < float(metrics["router_entropy"]) <= np.log(5)
    shifted = batch._replace(routing=np.roll(batch.routing, 1, axis=2))
    assert float(scored(model, shifted)[1]["routing_disagreements"]) > 0.1
    replayed, _ = scored(model, batch, replay_routing=True)
    tiny.assert_trees_close(replayed, grads, 1e-6)


@pytest.mark.slow
def test_replayed_experts_process_the_tokens(model, batch):
    """Where experts 3 and 4 are replayed, only they have gradients, and the logprobs are theirs."""
    forced = np.where(batch.routing < 0, -1, np.array([3, 4], np.int16))
    batch = batch._replace(routing=forced.astype(np.int16), problem_tokens=batch.problem_tokens[..., :0])
    batch = batch._replace(system_tokens=batch.system_tokens[..., :0])
    everything = batch._replace(routing=np.broadcast_to(np.int16([3, 4]), forced.shape))
    grads, metrics = scored(model, everything, replay_routing=True)
    assert float(metrics["routing_disagreements"]) > 0.2 and float(metrics["log_ratio_abs"]) > 1e-3
    moved = np.abs(grads["layers"]["mlp"]["up"]["weight"]).max((0, 2, 3))
    assert (moved[:3] == 0).all() and (moved[3:] > 0).all()
    some, _ = scored(model, batch, replay_routing=True)
    moved = np.abs(some["layers"]["mlp"]["up"]["weight"]).max((0, 2, 3))
    assert (moved > 0).all()  # tokens of the environment keep the routers' choice
