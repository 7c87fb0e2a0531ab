import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from espl_jax import sharding
from espl_jax.models import lora, transformer
from espl_jax.optimizer import make_optimizer
from espl_jax.sampling import decode, draw
from espl_jax.sampling.generate import sample_tree
from espl_jax.train_step import init_train_state, policy_gradient_step
from tests import ragged_tree, tiny

# Every logical axis divides, the vocabulary too.
CONFIG = tiny.CONFIG.replace(vocab_size=64)
SYSTEMS = [[5, 6, 7, 8], [9]]
PROBLEMS = [[[9, 10], [11]], [[12, 13, 14], [15, 16]]]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture(scope="module")
def params():
    return tiny.params(CONFIG)


@pytest.fixture(scope="module")
def placed(params, mesh):
    return sharding.place(params, transformer.abstract(CONFIG), mesh)


class TestMesh:
    @pytest.mark.parametrize(
        ("sizes", "shape"),
        [
            (None, (1, 8, 1)),
            ({"fsdp": -1}, (1, 8, 1)),
            ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
            ({"tensor": -1, "data": 4}, (4, 1, 2)),
            ({"data": 8}, (8, 1, 1)),
        ],
    )
    def test_sizes(self, sizes, shape):
        mesh = sharding.make_mesh(sizes)
        assert mesh.axis_names == ("data", "fsdp", "tensor")
        assert tuple(mesh.shape.values()) == shape

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"model": 8}, r"mesh axes \['model'\] are unknown"),
            ({"data": 3, "fsdp": -1}, "'data': 3.*does not hold the 8 devices"),
            ({"data": 2}, "does not hold the 8 devices"),
            ({"data": 16, "fsdp": -1}, "does not hold the 8 devices"),
            ({"data": 0, "fsdp": 8}, "does not hold the 8 devices"),
            ({"data": -1, "fsdp": -1}, "does not hold the 8 devices"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, sizes, message):
        with pytest.raises(ValueError, match=message):
            sharding.make_mesh(sizes)

    def test_devices_that_are_given(self):
        devices = jax.devices()[2:6]
        mesh = sharding.make_mesh({"data": 2, "tensor": -1}, devices)
        assert tuple(mesh.shape.values()) == (2, 1, 2) and set(mesh.devices.flat) == set(devices)
        assert sharding.make_mesh({}, devices[:1]).size == 1
        with pytest.raises(ValueError, match="does not hold the 4 devices"):
            sharding.make_mesh({"tensor": 8}, devices)

    def test_one_device_needs_no_mesh(self, monkeypatch, params):
        one = jax.devices()[:1]
        monkeypatch.setattr(jax, "devices", lambda: one)
        assert sharding.make_mesh() is None
        assert sharding.place(params, transformer.abstract(CONFIG), None) is params


class TestPlacement:
    def test_params(self, placed, params):
        layers = placed["layers"]
        specs = {
            "embedding": (placed["embedding"]["weight"], P("tensor", "fsdp")),
            "query": (layers["attention"]["query"]["weight"], P(None, "fsdp", "tensor", None)),
            "key": (layers["attention"]["key"]["weight"], P(None, "fsdp", "tensor", None)),
            "out": (layers["attention"]["out"]["weight"], P(None, "tensor", None, "fsdp")),
            "down": (layers["mlp"]["down"]["weight"], P(None, "tensor", "fsdp")),
        }
        for name, (weight, spec) in specs.items():
            assert weight.sharding.spec == spec, name
            assert weight.addressable_shards[0].data.size == weight.size // 4, name
        jax.tree.map(np.testing.assert_array_equal, placed, params)

    def test_an_axis_that_does_not_divide_stays_whole(self, mesh):
        assert sharding.named(mesh, ("vocab", "embed"), (61, 16)).spec == P(None, "fsdp")
        assert sharding.named(mesh, ("rows", None), (6, 3)).spec == P(None, None)
        assert sharding.named(mesh, ("rows", None), (8, 3)).spec == P(("data", "fsdp"), None)

    def test_optimizer_state_lies_where_its_params_lie(self, placed):
        state = init_train_state(placed, make_optimizer(1e-3))
        mu = optax.tree.get(state.opt_state, "mu")
        jax.tree.map(lambda m, p: np.testing.assert_equal(m.sharding.spec, p.sharding.spec), mu, placed)


def sample(params, mesh):
    m, b, n = np.ogrid[:2, :2, :4]
    keys = draw.row_keys(jax.random.key(0, impl="threefry2x32"), m, b, n)
    return sample_tree(
        params,
        CONFIG,
        SYSTEMS,
        PROBLEMS,
        keys,
        max_new_tokens=12,
        temperature=1.0,
        stop_ids=(3,),
        chunk=5,
        mesh=mesh,
    )


def test_sampling_on_eight_devices(params, placed, mesh):
    alone, spread = sample(params, None), sample(placed, mesh)
    np.testing.assert_array_equal(spread.tokens, alone.tokens)
    np.testing.assert_array_equal(spread.lengths, alone.lengths)
    np.testing.assert_array_equal(spread.truncated, alone.truncated)
    np.testing.assert_allclose(spread.logprobs, alone.logprobs, atol=1e-5)


def test_rows_lie_on_all_devices(mesh):
    key, value = decode.reserve(CONFIG, 8, 32, mesh)
    spec = P(None, "tensor", ("data", "fsdp"), None, None)
    assert key.sharding.spec == value.sharding.spec == spec
    assert key.addressable_shards[0].data.shape == (CONFIG.num_layers, 1, 2, CONFIG.head_dim, 32)
    assert not key.any()
    rows = sharding.place_rows(np.zeros((8, 2), np.float32), mesh)
    assert rows.sharding.spec == P(("data", "fsdp"), None)


def test_a_step_on_eight_devices(params, placed, mesh):
    """The same loss, gradient and update as on one device, and everything stays where it was."""
    # Four problems, so that they divide over data and fsdp.
    batch = ragged_tree.random_batch(0, CONFIG.vocab_size, (2, 4, 2))
    spread_batch = sharding.place_batch(batch, mesh)
    assert spread_batch.inputs.sharding.spec == P(None, ("data", "fsdp"), None, None)
    assert spread_batch.system_tokens.sharding.is_fully_replicated
    optimizer = make_optimizer(1e-2, max_grad_norm=0.0)

    def step(params, batch):
        copy = jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), params)
        state = init_train_state(copy, optimizer)
        return policy_gradient_step(state, None, None, batch, CONFIG, optimizer, microbatch_rows=4)

    alone, expected = step(params, batch)
    spread, metrics = step(placed, spread_batch)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
    # After one step Adam's mean is a tenth of the gradient.
    means = [optax.tree.get(state.opt_state, "mu") for state in (spread, alone)]
    tiny.assert_trees_close(*means, 1e-5)
    for tree in (spread.trainable, means[0]):
        for x, was in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
            assert x.sharding.is_equivalent_to(was.sharding, x.ndim)


def test_adapters_lie_beside_their_weights(mesh):
    adapters = sharding.place(tiny.adapters(CONFIG, rank=2), lora.abstract_adapters(CONFIG, 2), mesh)
    query = adapters["layers"]["attention"]["query"]
    assert query["lora_a"].sharding.spec == P(None, "fsdp", None)
    assert query["lora_b"].sharding.spec == P(None, None, "tensor", None)
