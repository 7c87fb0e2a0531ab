import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_jax.models import rope
from espl_jax.models.config import Rope


class TestFrequencies:
    def test_plain_by_hand(self):
        np.testing.assert_allclose(rope.frequencies(Rope(theta=100.0), 4), [1.0, 0.1], rtol=1e-6)

    def test_linear_divides_all(self):
        scaled = Rope(theta=100.0, scaling="linear", factor=8.0)
        np.testing.assert_allclose(rope.frequencies(scaled, 4), [1 / 8, 0.1 / 8], rtol=1e-6)

    def test_llama3_by_hand(self):
        """Frequencies 1, 0.1, 0.01 turn 100, 10 and 1 times in 628 positions; limits 4 and 16, so that the
        second keeps half of itself and has half divided by 2."""
        scaled = Rope(
            theta=1e3, scaling="llama3", factor=2.0, original_positions=round(200 * math.pi),
            low_freq_factor=4.0, high_freq_factor=16.0,
        )  # fmt: skip
        np.testing.assert_allclose(rope.frequencies(scaled, 6), [1.0, 0.075, 0.005], rtol=1e-3)

    def test_yarn_by_hand(self):
        """Frequencies 10^0 to 10^-3 turn 100, 10, 1 and 0.1 times; from index 1 (10 turns) to index 3 (0.1)
        the divided share grows from none to all."""
        scaled = Rope(
            theta=1e4, scaling="yarn", factor=2.0, original_positions=round(200 * math.pi),
            beta_fast=10.0, beta_slow=0.1, truncate=False,
        )  # fmt: skip
        np.testing.assert_allclose(
            rope.frequencies(scaled, 8), [1.0, 0.1, 0.01 * 0.75, 0.001 * 0.5], rtol=1e-3
        )

    def test_yarn_truncated_to_whole_frequencies(self):
        fields = {"theta": 1e4, "scaling": "yarn", "factor": 2.0, "original_positions": 628}
        ragged = Rope(**fields, beta_fast=5.0, beta_slow=0.2)  # indices 1.3 and 2.7, widened to 1 and 3
        np.testing.assert_allclose(rope.frequencies(ragged, 8), [1.0, 0.1, 0.0075, 0.0005], rtol=1e-6)

    @pytest.mark.parametrize("scaling", ["llama3", "yarn"])
    def test_the_original_context_must_be_known(self, scaling):
        with pytest.raises(ValueError, match=r"original_positions=0: scaling=.* needs the context length"):
            Rope(scaling=scaling, factor=2.0)

    def test_unknown_scaling(self):
        with pytest.raises(ValueError, match="scaling='dynamic' is unknown"):
            Rope(scaling="dynamic")


class TestRotation:
    def test_tables_by_hand(self):
        cos, sin = rope.tables(jnp.array([0, 2]), Rope(theta=100.0, attention_factor=3.0), 4)
        np.testing.assert_allclose(cos, 3 * np.cos([[0, 0], [2, 0.2]]), rtol=1e-6)
        np.testing.assert_allclose(sin, 3 * np.sin([[0, 0], [2, 0.2]]), rtol=1e-6)

    def test_halves_rotate_together(self):
        x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
        angles = jnp.array([[np.pi / 2, 0.0]])
        out = rope.rotate(x, jnp.cos(angles), jnp.sin(angles))
        np.testing.assert_allclose(out, [[[-3.0, 2.0, 1.0, 4.0]]], atol=1e-6)

    @settings(max_examples=20)
    @given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 50))
    def test_scores_depend_on_the_distance_alone(self, i, j, shift):
        q, k = (
            jnp.asarray(np.random.default_rng(seed).normal(size=(1, 1, 6)), jnp.float32) for seed in (0, 1)
        )

        def score(i, j):
            cos, sin = rope.tables(jnp.array([i, j]), Rope(theta=500.0), 6)
            return float((rope.rotate(q, cos[:1], sin[:1]) * rope.rotate(k, cos[1:], sin[1:])).sum())

        assert score(i, j) == pytest.approx(score(i + shift, j + shift), abs=1e-4)
        assert score(i, i) == pytest.approx(float((q * k).sum()), abs=1e-4)
