import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_jax.models import layers
from tests import tiny

SIZES = {"t": 5, "d": 12, "n": 3, "k": 2, "h": 4, "f": 7, "v": 11, "r": 2}

# Every product of the decoder: projections, their adapters, the head. The gradients' follow from them.
SPECS = [
    "td,dnh->tnh",
    "td,dkh->tkh",
    "tnh,nhd->td",
    "td,df->tf",
    "tf,fd->td",
    "td,vd->tv",
    "td,dr->tr",
    "tf,fr->tr",
    "tnh,nhr->tr",
    "tr,rnh->tnh",
    "tr,rkh->tkh",
    "tr,rd->td",
    "tr,rf->tf",
    "tr,rv->tv",
]

BFLOAT16 = tiny.CONFIG.replace(matmul_precision="bfloat16")


def normal(letters, seed):
    shape = [SIZES[letter] for letter in letters]
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def operands(spec):
    left, right = spec.split("->")[0].split(",")
    return normal(left, 0), normal(right, 1)


def rounded(x):
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)


class TestBfloat16Product:
    @pytest.mark.parametrize("spec", SPECS)
    def test_value(self, spec):
        x, weight = operands(spec)
        out = layers.product(spec, jnp.asarray(x), jnp.asarray(weight), BFLOAT16)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, np.einsum(spec, rounded(x), rounded(weight)), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("spec", SPECS)
    def test_gradient(self, spec):
        x, weight = operands(spec)
        inputs, result = spec.split("->")
        left, right = inputs.split(",")
        g = normal(result, 2)
        _, pull_back = jax.vjp(lambda x, w: layers.product(spec, x, w, BFLOAT16), x, weight)
        x_bar, weight_bar = pull_back(jnp.asarray(g))
        # Exactly the products of rounded operands, and near those of float32.
        pairs = [
            (x_bar, f"{result},{right}->{left}", (g, weight)),
            (weight_bar, f"{left},{result}->{right}", (x, g)),
        ]
        for ours, transposed, (a, b) in pairs:
            expected = np.einsum(transposed, rounded(a), rounded(b))
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
            assert tiny.relative_error(ours, np.einsum(transposed, a, b)) < 1e-2

    def test_cotangents_take_the_dtype_of_what_they_belong_to(self):
        x, weight = (jnp.asarray(a, jnp.bfloat16) for a in operands("td,df->tf"))
        out, pull_back = jax.vjp(lambda x, w: layers.product("td,df->tf", x, w, BFLOAT16), x, weight)
        assert out.dtype == jnp.float32
        assert [bar.dtype for bar in pull_back(out)] == [jnp.bfloat16, jnp.bfloat16]


class TestEinsum:
    @pytest.mark.parametrize(
        ("dtype", "precision", "result"),
        [
            ("float32", "default", "float32"),
            ("float32", "highest", "float32"),
            ("float32", "bfloat16", "float32"),
            ("bfloat16", "default", "bfloat16"),
            ("bfloat16", "bfloat16", "float32"),
        ],
    )
    def test_dtype(self, dtype, precision, result):
        config = tiny.CONFIG.replace(dtype=dtype, matmul_precision=precision)
        x, weight = operands("td,df->tf")
        out = layers.einsum("td,df->tf", jnp.asarray(x), {"weight": jnp.asarray(weight)}, config)
        assert out.dtype == result
        np.testing.assert_allclose(out.astype(jnp.float32), x @ weight, rtol=0.05, atol=0.2)

    @pytest.mark.parametrize("spec", [spec for spec in SPECS if "r" not in spec])
    @pytest.mark.parametrize("precision", ["default", "bfloat16"])
    def test_adapters(self, spec, precision):
        config = tiny.CONFIG.replace(lora_scale=0.5, matmul_precision=precision)
        x, weight = operands(spec)
        left, right = spec.split("->")[0].split(",")
        contracted = [letter for letter in right if letter in left]
        kept = [letter for letter in right if letter not in left]
        a, b = normal([*contracted, "r"], 3), normal(["r", *kept], 4)
        linear = {"weight": jnp.asarray(weight), "lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}
        update = np.einsum(f"{''.join(contracted)}r,r{''.join(kept)}->{right}", a, b)
        expected = np.einsum(spec, x, weight + 0.5 * update)
        out = layers.einsum(spec, jnp.asarray(x), linear, config)
        assert tiny.relative_error(out, expected) < (1e-2 if precision == "bfloat16" else 1e-6)


class TestAsIntegers:
    def test_only_bfloat16_weights_change(self):
        params = tiny.params(tiny.CONFIG.replace(param_dtype="bfloat16"))
        seen = layers.as_integers(params["layers"] | {"other": {"weight": jnp.ones(3)}})
        assert seen["mlp"]["up"]["weight"].dtype == jnp.uint16
        assert seen["mlp_norm"]["scale"].dtype == jnp.bfloat16
        assert seen["other"]["weight"].dtype == jnp.float32

    @pytest.mark.parametrize("precision", ["default", "bfloat16"])
    def test_products_are_the_same_bit_for_bit(self, precision):
        config = tiny.CONFIG.replace(dtype="bfloat16", matmul_precision=precision)
        x, weight = (jnp.asarray(a, jnp.bfloat16) for a in operands("td,df->tf"))
        seen = layers.as_integers({"weight": weight})
        np.testing.assert_array_equal(
            layers.einsum("td,df->tf", x, seen, config),
            layers.einsum("td,df->tf", x, {"weight": weight}, config),
        )


def test_rms_norm_by_hand():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    out = layers.rms_norm(x, {"scale": jnp.array([1.0, 2.0])}, tiny.CONFIG.replace(norm_eps=0.5))
    root = np.sqrt(12.5 + 0.5)
    np.testing.assert_allclose(out, [[3 / root, 8 / root], [0, 0]], rtol=1e-6)


class TestRope:
    def test_angles_by_hand(self):
        angles = layers.rope_angles(jnp.array([0, 2]), tiny.CONFIG.replace(head_dim=4, rope_theta=100.0))
        np.testing.assert_allclose(angles, [[0, 0], [2, 0.2]], rtol=1e-6)

    def test_halves_rotate_together(self):
        x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
        out = layers.rope(x, jnp.array([[np.pi / 2, 0.0]]))
        np.testing.assert_allclose(out, [[[-3.0, 2.0, 1.0, 4.0]]], atol=1e-6)

    @settings(max_examples=20)
    @given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 50))
    def test_scores_depend_on_the_distance_alone(self, i, j, shift):
        q, k = (
            jnp.asarray(np.random.default_rng(seed).normal(size=(1, 1, 6)), jnp.float32) for seed in (0, 1)
        )

        def score(i, j):
            angles = layers.rope_angles(jnp.array([i, j]), tiny.CONFIG)
            return float((layers.rope(q, angles[:1]) * layers.rope(k, angles[1:])).sum())

        assert score(i, j) == pytest.approx(score(i + shift, j + shift), abs=1e-4)
        assert score(i, i) == pytest.approx(float((q * k).sum()), abs=1e-4)


def test_gated_mlp_by_hand():
    weights = {"gate": [[1.0], [0.0]], "up": [[0.0], [1.0]], "down": [[2.0, -1.0]]}
    weights = {name: {"weight": jnp.array(w)} for name, w in weights.items()}
    out = layers.gated_mlp(jnp.array([[1.0, 3.0]]), weights, tiny.CONFIG)
    hidden = 3.0 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(out, [[2 * hidden, -hidden]], rtol=1e-6)
