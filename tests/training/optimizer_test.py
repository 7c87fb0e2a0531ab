import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espl_jax.choices import OPTIMIZERS
from espl_jax.models import lora
from espl_jax.models.params import abstract
from espl_jax.training.optimizer import make_optimizer
from tests.support import tiny

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
GRADS = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([12.0])}  # norm 13


def first_momentum(optimizer):
    """Recovers the gradient that Adam received, from its first moment after one step."""
    _, state = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    return optax.tree.get(state, "mu")


@pytest.mark.parametrize(("limit", "factor"), [(1.0, 1 / 13), (13.5, 1.0), (0.0, 1.0)])
def test_clipping_by_the_norm_over_all_tensors(limit, factor):
    momentum = first_momentum(make_optimizer(1e-3, b1=0.5, max_grad_norm=limit))
    np.testing.assert_allclose(momentum["a"], 0.5 * factor * GRADS["a"], rtol=1e-6)
    np.testing.assert_allclose(momentum["b"], 0.5 * factor * GRADS["b"], rtol=1e-6)


def rates(optimizer, steps):
    """The largest change of each step; with a constant gradient Adam's is the learning rate."""
    state, found = optimizer.init(PARAMS), []
    for _ in range(steps):
        updates, state = optimizer.update(GRADS, state, PARAMS)
        found.append(float(jnp.abs(updates["b"]).max()))
    return found


def test_equal_settings_compile_a_step_once():
    """jit compares optimizers by identity: a second run in a process reuses the step of the first."""
    assert make_optimizer(1e-3, kind="adamw") is make_optimizer(1e-3, kind="adamw")
    assert make_optimizer(1e-3) is not make_optimizer(2e-3)


def test_learning_rate_and_warm_up():
    np.testing.assert_allclose(rates(make_optimizer(1e-3), 3), [1e-3] * 3, rtol=1e-4)
    np.testing.assert_allclose(
        rates(make_optimizer(8e-4, warmup_steps=4), 6), [2e-4, 4e-4, 6e-4, 8e-4, 8e-4, 8e-4], rtol=1e-4
    )
    np.testing.assert_allclose(rates(make_optimizer(8e-4, warmup_steps=1), 2), [8e-4] * 2, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # From 8 to 2 in four steps of 1.5, in the update after the fourth.
        ({"schedule": "linear", "decay_steps": 4, "final_rate": 0.25}, [8, 6.5, 5, 3.5, 2, 2]),
        ({"schedule": "linear", "decay_steps": 6, "warmup_steps": 2}, [4, 8, 8, 6, 4, 2, 0, 0]),
        # Half a cosine: (1 + cos(45 k degrees)) / 2 of what lies between.
        (
            {"schedule": "cosine", "decay_steps": 4},
            [8, 4 + 4 * 0.5**0.5, 4, 4 - 4 * 0.5**0.5, 0, 0],
        ),
        ({"schedule": "cosine", "decay_steps": 3, "warmup_steps": 1, "final_rate": 0.5}, [8, 8, 6, 4, 4]),
        ({"schedule": "constant", "decay_steps": 2}, [8, 8, 8, 8]),
    ],
    ids=str,
)
def test_schedules_by_hand(options, expected):
    ours = rates(make_optimizer(8e-4, **options), len(expected))
    np.testing.assert_allclose(ours, np.multiply(expected, 1e-4), rtol=1e-4, atol=1e-9)


# What the layers of a decoder have, and an adapter.
NAMED = {
    "norm": {"scale": jnp.array([2.0, -1.0])},
    "linear": {"weight": jnp.array([[2.0, -4.0]]), "bias": jnp.array([3.0, 1.0])},
    "adapted": {"lora_a": jnp.array([[1.0]]), "lora_b": jnp.array([[-2.0]])},
}


def test_one_step_of_adamw_by_hand():
    optimizer = make_optimizer(0.1, kind="adamw", weight_decay=0.5, eps=0.0, max_grad_norm=0.0)
    grads = jax.tree.map(lambda x: jnp.full_like(x, -3.0), NAMED)
    updates, _ = optimizer.update(grads, optimizer.init(NAMED), NAMED)
    # Adam's first step is the rate times the sign; decay takes 0.1 * 0.5 of the weight.
    expected = {
        "norm": {"scale": [0.1, 0.1]},
        "linear": {"weight": [[0.1 - 0.1, 0.1 + 0.2]], "bias": [0.1, 0.1]},
        "adapted": {"lora_a": [[0.1 - 0.05]], "lora_b": [[0.1 + 0.1]]},
    }
    for ours, wanted in zip(
        jax.tree.leaves(updates), jax.tree.leaves(expected, is_leaf=is_list), strict=True
    ):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-7)


def is_list(x):
    return isinstance(x, list)


def test_one_step_of_adafactor_by_hand():
    # Rows and columns of squares are sums of a product, so that factoring loses nothing: signs remain.
    rows, columns = np.linspace(1, 2, 128), np.linspace(-3, 4, 130)
    weight = jnp.asarray(np.stack([np.outer(rows, columns), np.outer(columns[:128], columns)]), jnp.float32)
    optimizer = make_optimizer(0.1, kind="adafactor", max_grad_norm=0.0)
    params = {"weight": jnp.ones_like(weight), "scale": jnp.ones(3)}
    grads = {"weight": weight, "scale": jnp.array([2.0, -0.5, 0.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["weight"], -0.1 * np.sign(weight), rtol=1e-4)
    np.testing.assert_allclose(updates["scale"], [-0.1, 0.1, 0.0], rtol=1e-5)


WIDE = tiny.CONFIG.replace(embed_dim=256, mlp_dim=384, head_dim=128, vocab_size=512, qkv_bias=True)


def shapes(declared):
    return jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.shape, jnp.float32), declared)


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_adafactor_keeps_little():
    trainable = shapes(abstract(WIDE))
    adam, adafactor = (
        jax.eval_shape(make_optimizer(1e-3, kind=kind).init, trainable) for kind in ("adam", "adafactor")
    )
    assert size(adam) == 2 * size(trainable) + 1
    assert size(adam) > 175 * size(adafactor)
    state = optax.tree.get(adafactor, "FactoredState")
    rows, columns, whole = (
        {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (state.v_row, state.v_col, state.v)
    )
    query = "['layers']['attention']['query']['weight']"  # [2 layers, 256, 4 heads, 128]
    assert (rows[query], columns[query], whole[query]) == ((2, 4, 128), (2, 256, 4), (1,))
    gate = "['layers']['mlp']['gate']['weight']"  # [2 layers, 256, 384]
    assert (rows[gate], columns[gate], whole[gate]) == ((2, 256), (2, 384), (1,))
    # Layers are never factored: neither norms nor biases, nor adapters, however many layers there are.
    for name in ("['layers']['mlp_norm']['scale']", "['layers']['attention']['query']['bias']"):
        assert rows[name] == columns[name] == (1,) and len(whole[name]) > 1
    deep = shapes(lora.abstract_adapters(WIDE.replace(num_layers=100), rank=32))
    state = jax.eval_shape(make_optimizer(1e-3, kind="adafactor").init, deep)
    assert jax.tree.map(lambda x: x.shape, optax.tree.get(state, "v")) == jax.tree.map(
        lambda x: x.shape, deep
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_can_be_mapped_over_the_params(kind):
    """As for shardings: every leaf is either a counter or has the weight that it belongs to beside it."""
    optimizer = make_optimizer(1e-3, kind=kind, schedule="linear", decay_steps=9, warmup_steps=1)
    trainable = shapes(abstract(WIDE))
    state = jax.eval_shape(optimizer.init, trainable)
    belongs = optax.tree.map_params(
        optimizer,
        lambda x, weight: x.shape == weight.shape,
        state,
        trainable,
        transform_non_params=lambda x: x,
    )
    leaves = jax.tree.leaves(belongs)
    weights = [x for x in leaves if isinstance(x, bool)]
    assert all(x.shape == () and x.dtype == jnp.int32 for x in leaves if not isinstance(x, bool))
    assert len(weights) == (3 if kind == "adafactor" else 2) * len(jax.tree.leaves(trainable))
    # Adafactor's rows and columns are smaller than their weights, and so is what stands for those left out.
    assert all(weights) == (kind != "adafactor")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sgd"}, "kind='sgd' is unknown; choose one of"),
        ({"schedule": "step"}, "schedule='step' is unknown; choose one of"),
        ({"weight_decay": 0.1}, "weight_decay=0.1: adam has no weight decay; use kind='adamw'"),
        ({"schedule": "linear"}, "decay_steps=0: schedule='linear' decays after warmup_steps=0"),
        (
            {"schedule": "cosine", "decay_steps": 3, "warmup_steps": 3},
            "decay_steps=3: schedule='cosine' decays after warmup_steps=3",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(1e-3, **options)
