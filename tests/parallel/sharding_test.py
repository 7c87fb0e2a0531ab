import functools
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from configs import common
from espl_jax.models import lora
from espl_jax.models.params import abstract
from espl_jax.parallel import sharding
from espl_jax.sampling import decode, draw
from espl_jax.training import step as training_step
from espl_jax.training.optimizer import make_optimizer
from espl_jax.training.state import init_train_state
from espl_jax.training.step import place_batch
from experiments.bench.tpu_shapes import Shapes
from tests.support import ragged_tree, tiny
from tests.support.flat import policy_gradient_step, sample_tree

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
    return sharding.place(params, abstract(CONFIG), mesh)


class TestMesh:
    @pytest.mark.parametrize(
        ("sizes", "shape"),
        [
            (None, (1, 8, 1, 1)),
            ({"fsdp": -1}, (1, 8, 1, 1)),
            ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2, 1)),
            ({"tensor": -1, "data": 4}, (4, 1, 2, 1)),
            ({"data": 8}, (8, 1, 1, 1)),
            ({"fsdp": 2, "tensor": 2, "expert": -1}, (1, 2, 2, 2)),
        ],
    )
    def test_sizes(self, sizes, shape):
        mesh = sharding.make_mesh(sizes)
        assert mesh.axis_names == ("data", "fsdp", "tensor", "expert")
        assert tuple(mesh.shape.values()) == shape

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"model": 8}, r"mesh axes \['model'\] are unknown"),
            ({"data": 3, "fsdp": -1}, "'data': 3.*does not match the 8 devices"),
            ({"data": 2}, "does not match the 8 devices"),
            ({"data": 16, "fsdp": -1}, "does not match the 8 devices"),
            ({"data": 0, "fsdp": 8}, "does not match the 8 devices"),
            ({"data": -1, "fsdp": -1}, "does not match the 8 devices"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, sizes, message):
        with pytest.raises(ValueError, match=message):
            sharding.make_mesh(sizes)

    def test_devices_that_are_given(self):
        devices = jax.devices()[2:6]
        mesh = sharding.make_mesh({"data": 2, "tensor": -1}, devices)
        assert tuple(mesh.shape.values()) == (2, 1, 2, 1) and set(mesh.devices.flat) == set(devices)
        assert sharding.make_mesh({}, devices[:1]).size == 1
        with pytest.raises(ValueError, match="does not match the 4 devices"):
            sharding.make_mesh({"tensor": 8}, devices)

    def test_one_device_needs_no_mesh(self, monkeypatch, params):
        one = jax.devices()[:1]
        monkeypatch.setattr(jax, "devices", lambda: one)
        assert sharding.make_mesh() is None
        assert sharding.place(params, abstract(CONFIG), None) is params


ROWS = ("data", "fsdp", "expert")
BOTH = ("tensor", "fsdp")


class TestPlacement:
    @pytest.mark.parametrize(
        ("name", "training", "sampling"),
        [
            ("embedding", P("tensor", "fsdp"), P(BOTH, None)),
            ("query", P(None, "fsdp", "tensor", None), P(None, None, BOTH, None)),
            # Two kv heads: enough for `tensor`, too few for both axes together.
            ("key", P(None, "fsdp", "tensor", None), P(None, None, "tensor", None)),
            ("out", P(None, "tensor", None, "fsdp"), P(None, BOTH, None, None)),
            ("down", P(None, "tensor", "fsdp"), P(None, BOTH, None)),
        ],
    )
    def test_params(self, params, mesh, name, training, sampling):
        for phase, spec in (("training", training), ("sampling", sampling)):
            placed = sharding.place(params, abstract(CONFIG), mesh, phase)
            layers = placed["layers"]
            weights = {"embedding": placed["embedding"], **layers["attention"], **layers["mlp"]}
            weight = weights[name]["weight"]
            assert weight.sharding.spec == spec, phase
            shards = 2 if spec == P(None, None, "tensor", None) else 4
            assert weight.addressable_shards[0].data.size == weight.size // shards
            jax.tree.map(np.testing.assert_array_equal, placed, params)

    def test_adapters_lie_beside_their_weights(self, mesh):
        adapters, declared = tiny.adapters(CONFIG, rank=2), lora.abstract_adapters(CONFIG, 2)
        for phase, query_a, query_b, down_a in (
            ("training", P(None, "fsdp", None), P(None, None, "tensor", None), P(None, "tensor", None)),
            ("sampling", P(None, None, None), P(None, None, BOTH, None), P(None, BOTH, None)),
        ):
            layers = sharding.place(adapters, declared, mesh, phase)["layers"]
            assert layers["attention"]["query"]["lora_a"].sharding.spec == query_a
            assert layers["attention"]["query"]["lora_b"].sharding.spec == query_b
            assert layers["mlp"]["down"]["lora_a"].sharding.spec == down_a

    def test_kv_heads_that_do_not_divide_stay_whole(self):
        mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
        axes, shape = ("layers", "embed", "kv_heads", "head"), (2, 16, 2, 6)
        assert sharding.named(mesh, axes, shape).spec == P(None, "fsdp", None, None)
        assert sharding.named(mesh, axes, shape, "sampling").spec == P(None, None, None, None)
        assert sharding.cache_sharding(mesh, (2, 2, 8, 6, 32)).spec == P(None, None, ROWS, None, None)

    def test_an_axis_that_does_not_divide_stays_whole(self, mesh):
        assert sharding.named(mesh, ("vocab", "embed"), (61, 16)).spec == P(None, "fsdp")
        assert sharding.named(mesh, ("rows", None), (6, 3)).spec == P(None, None)
        assert sharding.named(mesh, ("rows", None), (8, 3)).spec == P(ROWS, None)

    def test_the_first_choice_that_fits_is_taken(self, mesh):
        """Of an axis, and in the order of the rules among the axes of one array."""

        def spec(axes, *shape):
            return sharding.named(mesh, axes, shape, "sampling").spec

        assert spec(("heads",), 8) == P(BOTH)
        assert spec(("heads",), 6) == P("tensor")  # 6 = 2 * 3 does not divide among four
        assert spec(("heads",), 5) == P(None)
        # Rows come first and have `fsdp`, wherever they stand; heads are left with `tensor`.
        assert spec(("rows", "heads"), 8, 8) == P(ROWS, "tensor")
        assert spec(("heads", "rows"), 8, 8) == P("tensor", ROWS)
        # Rows that do not divide leave it to them.
        assert spec(("rows", "heads"), 6, 8) == P(None, BOTH)
        # Tokens of the residual stream are not spread over `fsdp` in sampling.
        assert spec(("tokens", "heads", None), 8, 8, 3) == P(("data", "expert"), BOTH, None)
        assert sharding.named(mesh, ("tokens", "heads", None), (8, 8, 3)).spec == P(ROWS, "tensor", None)

    def test_caches_lie_by_rows(self, mesh):
        key, value = decode.reserve(CONFIG, 8, 32, mesh)
        spec = P(None, "tensor", ROWS, None, None)
        assert key.sharding.spec == value.sharding.spec == spec
        assert key.addressable_shards[0].data.shape == (CONFIG.num_layers, 1, 2, CONFIG.head_dim, 32)
        assert not key.any()
        shared = sharding.cache_sharding(mesh, key.shape, everywhere=True)
        assert shared.spec == P(None, "tensor", None, None, None)
        rows = sharding.place_rows(np.zeros((8, 2), np.float32), mesh)
        assert rows.sharding.spec == P(ROWS, None)

    @pytest.mark.parametrize(
        ("sizes", "shards"), [({"fsdp": 8}, 8), ({"data": 2, "tensor": 4}, 2), ({"fsdp": 2, "expert": 4}, 8)]
    )
    def test_row_parts(self, sizes, shards):
        assert sharding.row_shards(sharding.make_mesh(sizes)) == shards
        assert sharding.row_shards(None) == 1

    def test_optimizer_state_lies_where_its_params_lie(self, placed):
        state = init_train_state(placed, make_optimizer(1e-3))
        mu = optax.tree.get(state.opt_state, "mu")
        jax.tree.map(lambda m, p: np.testing.assert_equal(m.sharding.spec, p.sharding.spec), mu, placed)


def sample(params, mesh, phase="training"):
    m, b, n = np.ogrid[:2, :2, :4]
    keys = draw.row_keys(jax.random.key(0, impl="threefry2x32"), m, b, n)
    return sample_tree(
        params,
        CONFIG.replace(phase=phase),
        SYSTEMS,
        PROBLEMS,
        keys,
        max_new_tokens=12,
        temperature=1.0,
        stop_ids=(3,),
        chunk=5,
        mesh=mesh,
    )


@pytest.mark.parametrize("phase", [pytest.param("training", marks=pytest.mark.slow), "sampling"])
def test_sampling_on_eight_devices(params, mesh, phase):
    spread_params = sharding.place(params, abstract(CONFIG), mesh, phase)
    alone, spread = sample(params, None), sample(spread_params, mesh, phase)
    np.testing.assert_array_equal(spread.tokens, alone.tokens)
    np.testing.assert_array_equal(spread.lengths, alone.lengths)
    np.testing.assert_array_equal(spread.truncated, alone.truncated)
    np.testing.assert_allclose(spread.logprobs, alone.logprobs, atol=1e-5)


OPTIMIZER = make_optimizer(1e-2, max_grad_norm=0.0)
TREE = ragged_tree.random_tree(0, 61, (2, 2, 4))


def step(trainable, batch, config, frozen=None, kl_coef=0.0, microbatch_rows=3):
    """One update of a copy, since the state is donated."""
    copy = jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), trainable)
    return policy_gradient_step(
        init_train_state(copy, OPTIMIZER),
        frozen,
        frozen,
        batch,
        config,
        OPTIMIZER,
        kl_coef=kl_coef,
        microbatch_rows=microbatch_rows,
    )


def spread_batch(mesh):
    """Sixteen rollouts in groups of four: in no mesh do they divide evenly, and groups are split."""
    shards = sharding.row_shards(mesh)
    rows = 3 * -(-16 // (3 * shards))
    assert shards * rows > 16 and rows % 4
    return place_batch(TREE.train_batch(shards=shards, rows=rows), mesh)


def assert_same_step(spread, alone, placed):
    """The same loss, metrics and gradient, and everything stays where it was."""
    (spread, metrics), (alone, expected) = spread, alone
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
    # After one step Adam's mean is a tenth of the gradient.
    means = [optax.tree.get(state.opt_state, "mu") for state in (spread, alone)]
    tiny.assert_trees_close(*means, 1e-5)
    for tree in (spread.trainable, means[0]):
        for x, was in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
            assert x.sharding.is_equivalent_to(was.sharding, x.ndim)


def test_batches_lie_by_rows(mesh):
    batch = spread_batch(mesh)
    for name in ("inputs", "mask", "advantages", "rollout_problem", "problem_tokens", "problem_system"):
        x = getattr(batch, name)
        assert x.sharding.spec == P(ROWS, *(None,) * (x.ndim - 1)), name
    for name in ("system_tokens", "system_lengths", "num_rollouts", "num_tokens"):
        assert getattr(batch, name).sharding.is_fully_replicated, name
    assert batch.cutoffs is None and batch.old_logprobs is None
    whole = TREE.train_batch()
    assert place_batch(whole, None).inputs is whole.inputs


def test_no_device_holds_activations_of_all_rows():
    """Where tensor and fsdp meet, the compiler would gather all tokens for the gradients of weights, instead
    of summing what each device has of them."""
    config = CONFIG.replace(embed_dim=48, mlp_dim=160, num_heads=8, num_kv_heads=4, head_dim=16, remat="full")
    shapes = Shapes(config, sharding.make_mesh({"fsdp": 2, "tensor": 4}))
    c = common.get_config()
    c.lora.rank = 0
    batch, state = shapes.flat_batch(8, 40), shapes.train_state(c, OPTIMIZER)
    text = (
        training_step.policy_gradient_step.lower(state, None, None, batch, config, OPTIMIZER)
        .compile()
        .as_text()
    )
    tokens = 8 * 40
    assert f"[{tokens // 2},{160 // 4}]" in text, "a device's share of the hidden layer"
    wide = re.findall(rf"\w+\[{tokens},(?:160|48)\]", text)
    assert not wide, set(wide)


class TestStep:
    """An update on eight devices against one device, with a vocabulary that divides and one that does not."""

    @staticmethod
    @functools.cache
    def alone(config):
        return step(tiny.params(config), TREE.train_batch(), config, microbatch_rows=16)

    @pytest.mark.parametrize(
        ("sizes", "config"),
        [
            pytest.param({"fsdp": 8}, CONFIG, marks=pytest.mark.slow),
            pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, CONFIG, marks=pytest.mark.slow),
            pytest.param({"fsdp": 2, "tensor": 2, "expert": 2}, tiny.CONFIG, marks=pytest.mark.slow),
            ({"data": 2, "tensor": 4}, tiny.CONFIG),  # more than there are kv heads
        ],
        ids=lambda x: str(x) if isinstance(x, dict) else str(x.vocab_size),
    )
    def test_all_weights(self, sizes, config):
        mesh = sharding.make_mesh(sizes)
        placed = sharding.place(tiny.params(config), abstract(config), mesh)
        assert_same_step(step(placed, spread_batch(mesh), config), self.alone(config), placed)

    @pytest.mark.parametrize(
        "sizes",
        [
            pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
            pytest.param({"fsdp": 4, "expert": 2}, marks=pytest.mark.slow),
        ],
        ids=str,
    )
    def test_adapters_on_a_base_that_lies_as_sampling_wants_it(self, sizes):
        config = CONFIG.replace(lora_scale=0.5)
        base, adapters = tiny.params(config), tiny.adapters(config, rank=2)
        alone = step(adapters, TREE.train_batch(), config, base, kl_coef=0.3, microbatch_rows=16)
        mesh = sharding.make_mesh(sizes)
        frozen = sharding.place(base, abstract(config), mesh, "sampling")
        placed = sharding.place(adapters, lora.abstract_adapters(config, 2), mesh)
        spread = step(placed, spread_batch(mesh), config, frozen, kl_coef=0.3)
        assert_same_step(spread, alone, placed)
