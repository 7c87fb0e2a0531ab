import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.choices import AGGREGATIONS, LOSSES, SEQUENCE_LOSSES
from espl_jax.rl.losses import Loss, denominator, policy_gradient_loss

# By hand: ratios 2 and 1 with advantage 2, 1/2 with advantage -1, and a rollout without tokens.
LOGPROBS = jnp.log(jnp.array([[0.5, 0.4, 0.9], [0.2, 0.3, 0.9], [0.9, 0.9, 0.9]]))
SAMPLER = jnp.log(jnp.array([[0.25, 0.4, 0.9], [0.4, 0.3, 0.9], [0.9, 0.9, 0.9]]))
ADVANTAGES = jnp.array([2.0, -1.0, 5.0])
MASK = jnp.array([[True, True, False], [True, False, False], [False, False, False]])

METRICS = {"tokens", "ratio", "log_ratio_abs", "clip_fraction"}


def random_batch(seed, rows=5, length=7, spread=0.4):
    """Logprobs, sampler's, advantages, mask, old; the last row has no token, the first no advantage."""
    rng = np.random.default_rng(seed)
    sampler = -rng.exponential(size=(rows, length))
    old, logprobs = (sampler + rng.normal(0, spread, sampler.shape) for _ in range(2))
    advantages = rng.normal(size=rows)
    advantages[0] = 0.0
    mask = rng.random(sampler.shape) < 0.7
    mask[:, 0], mask[-1] = True, False
    logprobs, sampler, advantages, old = (
        jnp.asarray(x, jnp.float32) for x in (logprobs, sampler, advantages, old)
    )
    return logprobs, sampler, advantages, jnp.asarray(mask), old


def gradient(logprobs, sampler, advantages, mask=MASK, **options):
    return jax.grad(lambda x: policy_gradient_loss(x, sampler, advantages, mask, **options)[0])(logprobs)


def test_by_hand():
    loss, count, metrics = policy_gradient_loss(LOGPROBS, SAMPLER, ADVANTAGES, MASK)
    assert loss == pytest.approx(-(2 * 2 + 2 * 1 - 0.5), rel=1e-6)
    assert count == 2
    assert set(metrics) == METRICS
    assert metrics["tokens"] == 3
    assert metrics["ratio"] == pytest.approx(3.5, rel=1e-6)
    assert metrics["log_ratio_abs"] == pytest.approx(2 * np.log(2), rel=1e-6)
    assert metrics["clip_fraction"] == 0


def test_gradient_by_hand():
    expected = [[-4, -2, 0], [0.5, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(gradient(LOGPROBS, SAMPLER, ADVANTAGES), expected, rtol=1e-6)
    # On policy it is that of advantage * log pi.
    expected = [[-2, -2, 0], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(gradient(LOGPROBS, LOGPROBS, ADVANTAGES), expected, rtol=1e-6)


ROOT = math.sqrt(2)
HALF = math.log(0.5)


@pytest.mark.parametrize(
    ("options", "loss", "grads", "ratio", "clipped"),
    [
        # The first rollout's ratio is 2 * 1: 2 * 2, and the second's 1/2: -1/2.
        ({"kind": "sequence_importance_sampling"}, -3.5, [[-4, -4], [0.5, 0]], 4.5, 0),
        # 2 is clipped to 1.2, since more of it would pay; 1/2 to 0.8, since less of it would.
        ({"kind": "ppo"}, -(2.4 + 2 - 0.8), [[0, -2], [0, 0]], 3.5, 2),
        ({"kind": "ppo", "clip_high": 1.5}, -(4 + 2 - 0.8), [[-4, -2], [0, 0]], 3.5, 1),
        ({"kind": "ppo", "clip_low": 0.6}, -(2.4 + 2 - 0.5), [[0, -2], [0.5, 0]], 3.5, 1),
        # Clipped ratio * advantage * logprob; nobody loses its gradient.
        (
            {"kind": "cispo"},
            -(4 * HALF + 2 * math.log(0.4) - 0.5 * math.log(0.2)),
            [[-4, -2], [0.5, 0]],
            3.5,
            0,
        ),
        (
            {"kind": "cispo", "clip_low": 0.25, "clip_high": 0.5},
            -(3 * HALF + 2 * math.log(0.4) - 0.75 * math.log(0.2)),
            [[-3, -2], [0.75, 0]],
            3.5,
            2,
        ),
        # Geometric means sqrt(2 * 1) and 1/2, each of whose logarithms divides by the rollout's tokens.
        (
            {"kind": "gspo", "clip_low": 0.6, "clip_high": 0.5},
            -(2 * ROOT - 0.5),
            [[-ROOT, -ROOT], [0.5, 0]],
            2 * ROOT + 0.5,
            0,
        ),
        ({"kind": "gspo"}, -(2 * 1.0004 - 0.9997), [[0, 0], [0, 0]], 2 * ROOT + 0.5, 3),
    ],
)
def test_kinds_by_hand(options, loss, grads, ratio, clipped):
    ours, count, metrics = policy_gradient_loss(LOGPROBS, SAMPLER, ADVANTAGES, MASK, **options)
    assert ours == pytest.approx(loss, rel=1e-6)
    assert count == 2
    expected = np.zeros((3, 3))
    expected[:2, :2] = grads
    np.testing.assert_allclose(gradient(LOGPROBS, SAMPLER, ADVANTAGES, **options), expected, rtol=1e-6)
    assert metrics["ratio"] == pytest.approx(ratio, rel=1e-6)
    assert metrics["clip_fraction"] == clipped
    assert metrics["log_ratio_abs"] == pytest.approx(2 * np.log(2), rel=1e-6)


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_the_lesser_term_keeps_its_gradient_outside_the_range(kind):
    # Ratio 2 with a negative advantage and 1/2 with a positive one: moving back towards one is rewarded.
    flipped = jnp.array([[-1.0], [1.0]])[:, 0]
    logprobs, sampler, mask = LOGPROBS[:2, :1], SAMPLER[:2, :1], MASK[:2, :1]
    loss, _, metrics = policy_gradient_loss(logprobs, sampler, flipped, mask, kind)
    assert loss == pytest.approx(2 - 0.5, rel=1e-6)
    assert metrics["clip_fraction"] == 0
    np.testing.assert_allclose(
        gradient(logprobs, sampler, flipped, mask, kind=kind), [[2], [-0.5]], rtol=1e-6
    )


def test_sampler_weights_by_hand():
    # Old over sampler 4 and 1, truncated to 3 and 1; the policy over the old one 1/2 and 1.
    logprobs, old, sampler = (jnp.log(jnp.array([x])) for x in ([0.2, 0.3], [0.4, 0.3], [0.1, 0.3]))
    given = (logprobs, sampler, jnp.array([2.0]), jnp.ones((1, 2), bool))
    options = {"old_logprobs": old, "sampler_weight_cap": 3.0}

    def check(kind, loss, grads, weight, ratio):
        ours, _, metrics = policy_gradient_loss(*given, kind, **options)
        assert ours == pytest.approx(loss, rel=1e-6)
        np.testing.assert_allclose(gradient(*given, kind=kind, **options), [grads], rtol=1e-6)
        assert set(metrics) == METRICS | {"sampler_weight"}
        assert metrics["sampler_weight"] == pytest.approx(weight, rel=1e-6)
        assert metrics["ratio"] == pytest.approx(ratio, rel=1e-6)
        assert metrics["log_ratio_abs"] == pytest.approx(np.log(2), rel=1e-6)  # policy over sampler, 2 and 1

    check("importance_sampling", -(3 * 0.5 * 2 + 1 * 1 * 2), [-3, -2], 4, 1.5)
    check("ppo", -(3 * 0.5 * 2 + 2), [-3, -2], 4, 1.5)
    check("cispo", -(3 * 1 * math.log(0.2) + 2 * math.log(0.3)), [-3, -2], 4, 1.5)
    # Of the rollout: weight 4 truncated to 3, ratio 1/2; geometric means 2 and sqrt(1/2).
    check("sequence_importance_sampling", -(3 * 0.5 * 2), [-3, -3], 6, 1)
    check("gspo", -(2 * 2 / ROOT), [-ROOT, -ROOT], 4, ROOT)


@pytest.mark.parametrize("kind", LOSSES)
def test_ratios_are_to_the_old_policy_where_it_is_given(kind):
    logprobs, sampler, advantages, mask, old = random_batch(0)
    ours = policy_gradient_loss(logprobs, sampler, advantages, mask, kind, old_logprobs=old)
    to_old = policy_gradient_loss(logprobs, old, advantages, mask, kind)
    assert ours[0] == to_old[0] and ours[2]["ratio"] == to_old[2]["ratio"]
    gap = np.abs(logprobs - sampler)[np.asarray(mask)].sum()
    assert ours[2]["log_ratio_abs"] == pytest.approx(float(gap), rel=1e-5)
    assert to_old[2]["log_ratio_abs"] != ours[2]["log_ratio_abs"]


@pytest.mark.parametrize("kind", LOSSES)
def test_on_policy_all_kinds_follow_the_policy_gradient(kind):
    logprobs, _, advantages, mask, _ = random_batch(3)
    lengths = np.maximum(np.asarray(mask).sum(axis=1, keepdims=True), 1) if kind == "gspo" else 1
    expected = np.where(mask, -advantages[:, None] / lengths, 0.0)
    on_policy = gradient(logprobs, logprobs, advantages, mask, kind=kind)
    np.testing.assert_allclose(on_policy, expected, rtol=1e-6)


@pytest.mark.parametrize("cap", [0.0, 1.2])
@pytest.mark.parametrize("kind", ["importance_sampling", "ppo", "cispo"])
def test_in_the_first_update_the_old_logprobs_are_the_logprobs_themselves(kind, cap):
    logprobs, sampler, advantages, mask, _ = random_batch(2)

    def loss(x):
        options = {"old_logprobs": x, "sampler_weight_cap": cap}
        return policy_gradient_loss(x, sampler, advantages, mask, kind, **options)[0]

    weights = np.minimum(np.exp(logprobs - sampler), cap) if cap else 1.0
    expected = np.where(mask, -advantages[:, None] * weights, 0.0)
    np.testing.assert_allclose(jax.grad(loss)(logprobs), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nothing_outside_the_mask_is_seen(poison, kind):
    options = {"kind": kind, "sampler_weight_cap": 2.0}
    old = SAMPLER + 0.25

    clean = policy_gradient_loss(LOGPROBS, SAMPLER, ADVANTAGES, MASK, old_logprobs=old, **options)
    dirty = (
        jnp.where(MASK, LOGPROBS, poison),
        jnp.where(MASK, SAMPLER, poison),
        jnp.array([2.0, -1.0, poison]),
    )
    dirty_old = jnp.where(MASK, old, poison)
    for ours, expected in zip(
        jax.tree.leaves(policy_gradient_loss(*dirty, MASK, old_logprobs=dirty_old, **options)),
        jax.tree.leaves(clean),
        strict=True,
    ):
        assert ours == expected and np.isfinite(ours)
    np.testing.assert_array_equal(
        gradient(*dirty, old_logprobs=dirty_old, **options),
        gradient(LOGPROBS, SAMPLER, ADVANTAGES, old_logprobs=old, **options),
    )


@pytest.mark.parametrize("kind", ["ppo", "cispo", "gspo"])
def test_a_ratio_beyond_float32_is_clipped_like_any_other(kind):
    far = policy_gradient_loss(LOGPROBS, SAMPLER - 200, jnp.ones(3), MASK, kind)
    near = policy_gradient_loss(LOGPROBS, SAMPLER - 3, jnp.ones(3), MASK, kind)
    assert np.isfinite(far[0]) and far[0] == near[0]
    np.testing.assert_array_equal(
        gradient(LOGPROBS, SAMPLER - 200, jnp.ones(3), kind=kind),
        gradient(LOGPROBS, SAMPLER - 3, jnp.ones(3), kind=kind),
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_microbatches_add_up(kind):
    logprobs, sampler, advantages, mask, old = random_batch(1)

    def part(rows):
        return policy_gradient_loss(
            logprobs[rows],
            sampler[rows],
            advantages[rows],
            mask[rows],
            kind,
            old_logprobs=old[rows],
            sampler_weight_cap=1.5,
        )

    added = jax.tree.map(lambda *x: sum(x), part(slice(0, 1)), part(slice(1, 3)), part(slice(3, 5)))
    for ours, expected in zip(jax.tree.leaves(added), jax.tree.leaves(part(slice(0, 5))), strict=True):
        assert ours == pytest.approx(float(expected), rel=1e-5)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind='reinforce' is unknown; choose one of"):
        policy_gradient_loss(LOGPROBS, SAMPLER, ADVANTAGES, MASK, kind="reinforce")


def test_weights_without_old_logprobs_are_refused():
    with pytest.raises(ValueError, match=r"sampler_weight_cap=2.0: weights compare .* pass old_logprobs"):
        policy_gradient_loss(LOGPROBS, SAMPLER, ADVANTAGES, MASK, sampler_weight_cap=2.0)


def test_denominators():
    assert denominator(Loss(), 6.0, 40.0) == 6
    assert denominator(Loss(aggregation="token_mean"), 6.0, 40.0) == 40
    assert denominator(Loss(aggregation="constant_length", constant_length=10), 6.0, 40.0) == 60
    assert denominator(Loss(aggregation="token_mean"), 6.0, 0.0) == 1
    traced = jax.jit(denominator, static_argnames="loss")
    for aggregation in AGGREGATIONS:
        loss = Loss(aggregation=aggregation, constant_length=10)
        for tokens in (0.0, 40.0):
            assert traced(loss, 6.0, tokens) == denominator(loss, 6.0, tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "grpo"}, "kind='grpo' is unknown"),
        ({"aggregation": "mean"}, "aggregation='mean' is unknown"),
        ({"clip_low": 0.2}, "clip_low=0.2: kind='importance_sampling' does not clip"),
        ({"clip_high": 0.2}, "clip_high=0.2: kind='importance_sampling' does not clip"),
        ({"kind": "ppo", "clip_low": 1.1}, "clip_low=1.1: ratios are kept above"),
        ({"kind": "ppo", "clip_high": -0.1}, "clip_high=-0.1: ratios are kept below"),
        (
            {"aggregation": "constant_length"},
            "constant_length=0: aggregation='constant_length' divides by it",
        ),
        ({"sampler_weight_cap": -1.0}, "sampler_weight_cap=-1.0: give a positive cap"),
    ]
    + [
        ({"kind": kind, "aggregation": "token_mean"}, f"'token_mean': kind='{kind}' has one term per rollout")
        for kind in SEQUENCE_LOSSES
    ],
    ids=str,
)
def test_a_loss_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Loss(**fields)


def test_only_plain_importance_sampling_compares_with_the_sampler():
    plain = [kind for kind in LOSSES if not Loss(kind).needs_old_logprobs]
    assert plain == ["importance_sampling"]
    assert all(Loss(kind, sampler_weight_cap=2.0).needs_old_logprobs for kind in LOSSES)


def test_a_loss_is_a_static_argument():
    assert hash(Loss(kind="ppo", clip_low=0.1)) == hash(dataclasses.replace(Loss(kind="ppo"), clip_low=0.1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Loss().kind = "ppo"


class TestShapes(chex.TestCase):
    """Checks of the arguments, with and without jit."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_hand_values(self):
        loss = self.variant(functools.partial(policy_gradient_loss, kind="ppo"))
        logprobs = jnp.log(jnp.array([[0.5, 0.9], [0.2, 0.2]]))
        old = jnp.log(jnp.array([[0.4, 0.3], [0.2, 0.4]]))
        mask = jnp.array([[True, True], [True, False]])
        total, count, metrics = loss(logprobs, old, jnp.array([1.0, -1.0]), mask, old_logprobs=old)
        # Ratios 1.25 and 3, both clipped to 1.2 under a positive advantage; 1 under a negative one.
        chex.assert_trees_all_close((total, count, metrics["clip_fraction"]), (-1.4, 2.0, 2.0), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_other_shapes_are_refused(self):
        loss = self.variant(policy_gradient_loss)
        x, mask, advantages = jnp.zeros((2, 3)), jnp.ones((2, 3), bool), jnp.ones(2)
        for wrong in (
            (x[:1], x, advantages, mask),
            (x, x[0], advantages, mask),
            (x, x, advantages[:, None], mask),
            (x, x, advantages, mask.astype(jnp.int32)),
        ):
            with pytest.raises(AssertionError):
                loss(*wrong)
