import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.models import int8, layers
from espl_jax.parallel import sharding
from tests.support import tiny

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


def test_clamped_swiglu_by_hand():
    """A gate of 9 counts as 7, and `up` of -9 as -7. Clamped numbers have no gradient."""
    gate, up = jnp.array([0.0, 9.0, -9.0, 1.0]), jnp.array([3.0, 2.0, 0.5, -9.0])

    def out(gate, up):
        return layers.clamped_swiglu(gate, up, 7.0, 1.702)

    sigmoid = [1 / (1 + np.exp(-1.702 * x)) for x in (7.0, -9.0, 1.0)]
    expected = [0.0, 7 * sigmoid[0] * 3, -9 * sigmoid[1] * 1.5, sigmoid[2] * -6]
    np.testing.assert_allclose(out(gate, up), expected, rtol=1e-5)
    by_gate, by_up = jax.grad(lambda *x: out(*x).sum(), (0, 1))(gate, up)
    assert by_gate[1] == 0 and by_up[3] == 0
    np.testing.assert_allclose(by_gate[0], 0.5 * 4, rtol=1e-6)
    np.testing.assert_allclose(by_up[1], 7 * sigmoid[0], rtol=1e-6)


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


def rounded_to_int8(spec, weight):
    """The int8 weight and its scales, and the float weight that they stand for."""
    left, right = spec.split("->")[0].split(",")
    inputs = [axis - len(right) for axis, letter in enumerate(right) if letter in left]
    values, scale = int8.quantize(weight, inputs)
    return jnp.asarray(values), jnp.asarray(scale), int8.dequantize(values, scale, inputs)


class TestInt8:
    @pytest.mark.parametrize("spec", [spec for spec in SPECS if "r" not in spec])
    @pytest.mark.parametrize("precision", ["default", "bfloat16"])
    def test_value_and_gradient(self, spec, precision):
        """Those of the float weight that it stands for; int8 is exact in bfloat16, where scales are not."""
        config = tiny.CONFIG.replace(matmul_precision=precision)
        x, weight = operands(spec)
        values, scale, floats = rounded_to_int8(spec, weight)
        inputs, result = spec.split("->")
        left, right = inputs.split(",")
        g = normal(result, 2)
        linear = {"weight": values, "weight_scale": scale}
        out, pull_back = jax.vjp(lambda x: layers.einsum(spec, x, linear, config), jnp.asarray(x))
        exact = precision == "default"
        x = x if exact else rounded(x)
        np.testing.assert_allclose(out, np.einsum(spec, x, floats), rtol=1e-5, atol=1e-5)
        x_bar = np.einsum(f"{result},{right}->{left}", g, floats)
        assert tiny.relative_error(pull_back(jnp.asarray(g))[0], x_bar) < (1e-6 if exact else 1e-2)

    def test_by_hand(self):
        """Of the result 1 * 3 + 2 * 4 = 11, 0.1 times; the cotangent 1 comes back as 0.1 times the weight."""
        linear = {"weight": jnp.array([[3], [4]], jnp.int8), "weight_scale": jnp.array([0.1])}
        x = jnp.array([[1.0, 2.0]], jnp.bfloat16)
        config = tiny.CONFIG.replace(dtype="bfloat16")
        out, pull_back = jax.vjp(lambda x: layers.einsum("td,df->tf", x, linear, config), x)
        assert (out.dtype, out.item()) == (jnp.bfloat16, jnp.bfloat16(1.1))
        (x_bar,) = pull_back(out / out)
        assert x_bar.dtype == jnp.bfloat16
        # The cotangent in bfloat16, as for a float weight, is 0.1 rounded.
        np.testing.assert_array_equal(x_bar, (jnp.bfloat16(0.1) * jnp.array([[3, 4]])).astype(jnp.bfloat16))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_embeddings(self, dtype):
        """One scale per row of the vocabulary, which lookup and head share."""
        table = {"weight": jnp.array([[1, 2], [-127, 4]], jnp.int8), "weight_scale": jnp.array([0.1, 0.3])}
        config = tiny.CONFIG.replace(embed_scale=0.5, dtype=dtype, param_dtype="int8")
        out = layers.embed(jnp.array([1, 0]), table, config)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, [[-127 * 0.15, 4 * 0.15], [0.05, 0.1]], rtol=1e-6)
        hidden = jnp.array([[1.0, -1.0]])
        logits = layers.einsum("td,vd->tv", hidden, table, config, "float32")
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, [[-0.1, -131 * 0.3]], rtol=1e-6)

    @pytest.mark.parametrize(
        ("sizes", "accumulated"), [({"tensor": 8}, "bfloat16"), ({"data": 8}, "float32")]
    )
    def test_devices_sum_their_parts_in_the_compute_dtype(self, sizes, accumulated):
        """Devices on `data` hold all of what is contracted: nothing is rounded before the scale."""
        config = tiny.CONFIG.replace(dtype="bfloat16", phase="training")
        x, weight = normal("td", 0), np.random.default_rng(1).normal(size=(12, 16)).astype(np.float32)
        x = np.concatenate([x, x], axis=1)[:, :16]
        values, scale, floats = rounded_to_int8("tf,fd->td", weight.T)
        x = sharding.replicate(jnp.asarray(x, jnp.bfloat16), sharding.make_mesh(sizes))
        linear = {"weight": values, "weight_scale": scale}
        run = jax.jit(lambda x: layers.einsum("tf,fd->td", x, linear, config, contracts="mlp"))
        assert f"preferred_element_type={accumulated}" in str(run.trace(x).jaxpr)
        out = run(x)
        assert out.dtype == jnp.bfloat16
        assert tiny.relative_error(out, np.asarray(x, np.float32) @ floats) < 1e-2


class TestOutputsFirst:
    """While sampling on a CPU: another order of axes and, for few rows, of the product."""

    @pytest.mark.parametrize("precision", ["default", "bfloat16"])
    @pytest.mark.parametrize("rows", [1, 5, 200])
    @pytest.mark.parametrize("spec", ["td,dnh->tnh", "tnh,nhd->td", "td,df->tf"])
    @pytest.mark.parametrize("stored", ["float32", "int8"])
    def test_multiplies_as_the_weight_does(self, spec, rows, precision, stored):
        config = tiny.CONFIG.replace(
            phase="sampling", sampling_layout="unstacked", matmul_precision=precision, lora_scale=0.5
        )
        _, weight = operands(spec)
        left, right = spec.split("->")[0].split(",")
        kept = [axis for axis, letter in enumerate(right) if letter not in left]
        contracted = [axis for axis in range(len(right)) if axis not in kept]
        sizes = dict(zip(right, weight.shape, strict=True)) | {"t": rows, "r": 3}
        rng = np.random.default_rng(5)

        def draw(letters):
            return jnp.asarray(rng.normal(size=[sizes[letter] for letter in letters]), jnp.float32)

        adapter = {
            "lora_a": draw([right[axis] for axis in contracted] + ["r"]),
            "lora_b": draw(["r"] + [right[axis] for axis in kept]),
        }
        x, values, scales = draw(left), weight, {}
        if stored == "int8":
            values, scale, weight = rounded_to_int8(spec, weight)
            scales = {"weight_scale": scale}
        transposed = jnp.asarray(values).transpose(kept + contracted)
        unstacked = layers.Unstacked((0 * transposed, transposed), jnp.int32(1))
        out = layers.einsum(spec, x, {layers.OUTPUTS_FIRST: unstacked} | scales | adapter, config)
        expected = layers.einsum(
            spec, x, {"weight": jnp.asarray(weight)} | adapter, tiny.CONFIG.replace(lora_scale=0.5)
        )
        assert tiny.relative_error(out, expected) < (1e-2 if precision == "bfloat16" else 1e-6)


def test_rms_norm_by_hand():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    out = layers.rms_norm(x, {"scale": jnp.array([1.0, 2.0])}, tiny.CONFIG.replace(norm_eps=0.5))
    root = np.sqrt(12.5 + 0.5)
    np.testing.assert_allclose(out, [[3 / root, 8 / root], [0, 0]], rtol=1e-6)


def test_what_is_added_to_norm_scales():
    config = tiny.CONFIG.replace(norm_eps=0.0, norm_offset=1.0)
    out = layers.rms_norm(jnp.array([[3.0, 4.0]]), {"scale": jnp.array([0.0, 2.0])}, config)
    np.testing.assert_allclose(out, [[3 / np.sqrt(12.5), 12 / np.sqrt(12.5)]], rtol=1e-6)


def test_norms_are_of_the_last_axis():
    x = jnp.array([[[3.0, 4.0], [1.0, 1.0]]])
    out = layers.rms_norm(x, {"scale": jnp.ones(2)}, tiny.CONFIG.replace(norm_eps=0.0))
    np.testing.assert_allclose(out, [[[3 / np.sqrt(12.5), 4 / np.sqrt(12.5)], [1, 1]]], rtol=1e-6)


@pytest.mark.parametrize("precision", ["default", "bfloat16"])
def test_a_bias_joins_the_product_and_the_adapter(precision):
    linear = {
        "weight": jnp.array([[1.0], [2.0]]),
        "bias": jnp.array([0.5]),
        "lora_a": jnp.array([[1.0], [0.0]]),
        "lora_b": jnp.array([[2.0]]),
    }
    config = tiny.CONFIG.replace(lora_scale=4.0, matmul_precision=precision)
    np.testing.assert_array_equal(
        layers.einsum("td,df->tf", jnp.array([[3.0, 1.0]]), linear, config), [[29.5]]
    )


def test_the_gradient_of_a_bias_is_summed_over_tokens_in_float32():
    config = tiny.CONFIG.replace(dtype="bfloat16")
    tokens = jnp.zeros((1000, 1), jnp.bfloat16)

    def out(bias):
        return layers.einsum("td,df->tf", tokens, {"weight": jnp.zeros((1, 16)), "bias": bias}, config)

    rows = np.random.default_rng(0).normal(size=(1000, 16)).astype(jnp.bfloat16)
    result, pull_back = jax.vjp(out, jnp.zeros(16))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(pull_back(jnp.asarray(rows))[0], rows.astype(np.float64).sum(0), atol=1e-3)


def test_embeddings_are_scaled():
    table = {"weight": jnp.array([[1.0, 2.0], [3.0, 4.0]], jnp.bfloat16)}
    out = layers.embed(jnp.array([1, 0]), table, tiny.CONFIG.replace(embed_scale=0.5))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, [[1.5, 2.0], [0.5, 1.0]])


def test_gated_mlp_by_hand():
    weights = {"gate": [[1.0], [0.0]], "up": [[0.0], [1.0]], "down": [[2.0, -1.0]]}
    weights = {name: {"weight": jnp.array(w)} for name, w in weights.items()}
    out = layers.gated_mlp(jnp.array([[1.0, 3.0]]), weights, tiny.CONFIG)
    hidden = 3.0 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(out, [[2 * hidden, -hidden]], rtol=1e-6)


def test_the_gate_can_be_another_function():
    weights = {name: {"weight": jnp.array([[1.0]])} for name in ("gate", "up", "down")}
    out = layers.gated_mlp(jnp.array([[2.0]]), weights, tiny.CONFIG.replace(activation="gelu_tanh"))
    gate = 0.5 * 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (2 + 0.044715 * 8)))
    np.testing.assert_allclose(out, [[2 * gate]], rtol=1e-5)
