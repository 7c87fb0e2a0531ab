import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_jax.choices import NORMALIZATIONS
from espl_jax.rl.advantages import advantages

# Two prompts, two problems, three rollouts.
REWARDS = np.array([[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]], np.float32)


def test_per_prompt_by_hand():
    third = 1 / 3
    expected = [
        [[2 * third, -third, -third], [0, 0, 0]],
        [[third, third, -2 * third], [0, 0, 0]],
    ]
    np.testing.assert_allclose(advantages(REWARDS), expected, atol=1e-6)


def test_marginalized_by_hand():
    expected = [[[0.5, -0.5, -0.5], [0.5, 0.5, 0.5]], [[0.5, 0.5, -0.5], [-0.5, -0.5, -0.5]]]
    np.testing.assert_allclose(advantages(REWARDS, "marginalized"), expected, atol=1e-6)


def test_copies_of_a_prompt_share_a_baseline():
    rewards = np.concatenate([REWARDS, REWARDS[:1]])
    copies = np.asarray(advantages(rewards, prompt_ids=np.array([4, 9, 4])))
    np.testing.assert_allclose(copies[[0, 2]], advantages(rewards[[0, 2]], "marginalized"), atol=1e-6)
    np.testing.assert_allclose(copies[1:2], advantages(rewards[1:2]), atol=1e-6)
    two = np.stack([REWARDS[0], REWARDS[1]])
    pooled = advantages(two, prompt_ids=np.array([0, 0]))
    np.testing.assert_array_equal(pooled, advantages(two, "marginalized"))
    # The whole batch is one pool already.
    np.testing.assert_array_equal(
        advantages(rewards, "marginalized", prompt_ids=np.array([4, 9, 4])),
        advantages(rewards, "marginalized"),
    )


def test_std_by_hand():
    # Of 1, 0, 0 the mean is 1/3, and the mean square about it (4 + 1 + 1) / 27 = 2/9.
    root = np.sqrt(2)
    expected = [[[root, -1 / root, -1 / root], [0, 0, 0]], [[1 / root, 1 / root, -root], [0, 0, 0]]]
    np.testing.assert_allclose(advantages(REWARDS, normalize="std"), expected, rtol=1e-5)
    # Three of six each: mean 1/2, deviation 1/2.
    expected = [[[1, -1, -1], [1, 1, 1]], [[1, 1, -1], [-1, -1, -1]]]
    np.testing.assert_allclose(advantages(REWARDS, "marginalized", normalize="std"), expected, rtol=1e-5)


def test_batch_std_by_hand():
    # Six of twelve are ones: deviation 1/2 of all, whatever the groups.
    weights = advantages(REWARDS)
    np.testing.assert_allclose(advantages(REWARDS, normalize="batch_std"), 2 * weights, rtol=1e-5)
    few = np.array([[[0, 4], [0, 0]]], np.float32)  # mean 1, deviation sqrt((1 + 9 + 1 + 1) / 4)
    expected = [[[-2 / np.sqrt(3), 2 / np.sqrt(3)], [0, 0]]]
    np.testing.assert_allclose(advantages(few, normalize="batch_std"), expected, rtol=1e-5)


def test_copies_of_a_prompt_share_a_deviation():
    rewards = np.concatenate([REWARDS, 4 * REWARDS[:1]])
    copies = np.asarray(advantages(rewards, prompt_ids=np.array([4, 9, 4]), normalize="std"))
    pooled = advantages(rewards[[0, 2]], "marginalized", normalize="std")
    np.testing.assert_allclose(copies[[0, 2]], pooled, rtol=1e-5)
    np.testing.assert_allclose(copies[1:2], advantages(rewards[1:2], normalize="std"), rtol=1e-5)


@settings(max_examples=30)
@given(
    st.floats(-1e6, 1e6, width=32),
    st.sampled_from(["per_prompt", "marginalized"]),
    st.integers(0, 1000),
)
def test_properties(value, baseline, seed):
    equal = np.full((2, 2, 3), value, np.float32)
    for normalize in NORMALIZATIONS:
        zeros = np.asarray(advantages(equal, baseline, normalize=normalize))
        assert not zeros.any() and np.isfinite(zeros).all()  # exactly zero, not nearly
    rewards = np.random.default_rng(seed).normal(size=(2, 2, 3))
    weights = np.asarray(advantages(rewards, baseline))
    axes = 2 if baseline == "per_prompt" else (0, 2)
    np.testing.assert_allclose(weights.mean(axis=axes), 0, atol=1e-6)
    np.testing.assert_allclose(advantages(rewards + 7, baseline), weights, atol=1e-5)
    np.testing.assert_allclose(weights, rewards - rewards.mean(axis=axes, keepdims=True), atol=1e-5)
    deviation = rewards.std(axis=axes, keepdims=True)
    scaled = advantages(rewards, baseline, normalize="std")
    np.testing.assert_allclose(scaled, weights / (deviation + 1e-6), atol=1e-5)
    scaled = advantages(rewards, baseline, normalize="batch_std")
    np.testing.assert_allclose(scaled, weights / (rewards.std() + 1e-6), atol=1e-5)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="baseline='grpo' is unknown"):
        advantages(REWARDS, "grpo")
    with pytest.raises(ValueError, match="normalize='grpo' is unknown"):
        advantages(REWARDS, normalize="grpo")
    with pytest.raises(ValueError, match=r"rewards.shape=\(2, 3\)"):
        advantages(REWARDS[0])
