"""Three updates by two processes of four devices each, against one device: losses, gradients, params."""

import pickle
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from espl_jax.models.params import abstract
from espl_jax.parallel import processes, sharding
from espl_jax.training.state import init_train_state
from espl_jax.training.step import place_batch
from tests.support import ragged_tree, tiny
from tests.support.flat import compiled_gradients, policy_gradient_step
from tests.support.two_processes import run_pair

CONFIG = tiny.CONFIG.replace(vocab_size=64)
OPTIMIZER = optax.sgd(0.05)
CASES = [({"fsdp": 8}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 2), ({"data": 4, "expert": 2}, 0)]
"""Meshes, and how many rollouts of a shard go at a time."""


def three_steps(mesh, microbatch_rows):
    """Losses of three steps, the gradient of the first, and the params after the last, as numpy."""
    tree = ragged_tree.random_tree(0, CONFIG.vocab_size, (2, 3, 3))
    own = tiny.token_logprobs(tiny.params(CONFIG), CONFIG, ragged_tree.flatten(tree).tokens)
    tree = ragged_tree.on_policy(tree, own, noise=0.2)
    shards = sharding.row_shards(mesh)
    size = microbatch_rows or 1
    rows = size * -(-18 // (size * shards))
    batch = place_batch(tree.train_batch(shards=shards, rows=rows), mesh)
    params = sharding.place(tiny.params(CONFIG), abstract(CONFIG), mesh)
    grads, _ = compiled_gradients(params, None, None, batch, CONFIG, microbatch_rows=microbatch_rows)
    grads = fetched(grads, mesh)
    state, losses = init_train_state(params, OPTIMIZER), []
    state = sharding.replicate(state, mesh).replace(trainable=params)
    for _ in range(3):
        state, metrics = policy_gradient_step(
            state, None, None, batch, CONFIG, OPTIMIZER, microbatch_rows=microbatch_rows
        )
        losses.append(float(metrics["loss"]))
    return losses, grads, fetched(state.trainable, mesh)


def fetched(tree, mesh):
    """Returns whole arrays on this host."""
    if mesh is not None:
        tree = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.device_get(tree)


def run(path):
    """The program of each of the two processes."""
    results = [three_steps(sharding.make_mesh(sizes), size) for sizes, size in CASES]
    if processes.is_first():
        Path(path).write_bytes(pickle.dumps(results))


@pytest.mark.slow(minutes=2)
def test_two_processes_take_the_steps_of_one_device(tmp_path):
    program = "from tests.train_step_processes_test import run; run(sys.argv[1])"
    run_pair(program, tmp_path / "results", timeout=600)
    alone = three_steps(None, 0)
    assert len(set(alone[0])) == 3
    for losses, grads, params in pickle.loads((tmp_path / "results").read_bytes()):
        assert losses == pytest.approx(alone[0], rel=1e-5)
        tiny.assert_trees_close(grads, alone[1], 1e-5)
        tiny.assert_trees_close(params, alone[2], 1e-5)


@pytest.mark.parametrize(
    ("sizes", "microbatch_rows"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_eight_devices_take_the_steps_of_one(sizes, microbatch_rows):
    alone, spread = three_steps(None, 0), three_steps(sharding.make_mesh(sizes), microbatch_rows)
    assert spread[0] == pytest.approx(alone[0], rel=1e-5)
    for ours, reference in zip(spread[1:], alone[1:], strict=True):
        tiny.assert_trees_close(ours, reference, 1e-5)
        assert not any(np.isnan(x).any() for x in jax.tree.leaves(ours))
