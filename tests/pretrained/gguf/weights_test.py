import jax
import numpy as np
import pytest

from espl_jax.models.config import DecoderConfig, Rope
from espl_jax.models.params import abstract, to_storage
from espl_jax.pretrained.gguf.config import config_from_gguf
from espl_jax.pretrained.gguf.file import open_gguf
from espl_jax.pretrained.gguf.weights import params_from_gguf
from tests.pretrained.gguf.tiny_gguf import D, F, H, K, L, N, V, llama3_divisors, tiny_tensors


def read(path, **numerics):
    file = open_gguf(path)
    config = config_from_gguf(file, **numerics)
    return params_from_gguf(file, config), config


def interleaved(weight, heads):
    """Rows of a Hugging Face query or key weight in the order in which GGUF stores them."""
    return weight.reshape(heads, 2, H // 2, D).transpose(0, 2, 1, 3).reshape(weight.shape)


@pytest.fixture
def tensors():
    return tiny_tensors(np.random.default_rng(0))


def test_config(write_gguf, tensors):
    config = read(write_gguf(tensors), dtype="bfloat16", remat="none")[1]
    assert config == DecoderConfig(
        vocab_size=V,
        num_layers=L,
        embed_dim=D,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        mlp_dim=F,
        rope=Rope(theta=5000.0),
        norm_eps=1e-5,
        tied_head=False,
        max_positions=128,
        dtype="bfloat16",
        remat="none",
    )


def test_defaults_of_the_format(write_gguf, tensors):
    for i in range(L):
        for name in ("attn_k", "attn_v"):
            tensors[f"blk.{i}.{name}.weight"] = np.zeros((N * H, D), np.float32)
    config = read(write_gguf(tensors, {"attention.head_count_kv": None, "rope.freq_base": None}))[1]
    assert (config.num_kv_heads, config.rope) == (N, Rope(theta=10_000.0))


def test_every_weight_lands_in_its_place(write_gguf, tensors):
    stored = dict(tensors)
    for i in range(L):
        for name, heads in (("attn_q", N), ("attn_k", K)):
            key = f"blk.{i}.{name}.weight"
            stored[key] = interleaved(tensors[key], heads)
    params, _ = read(write_gguf(stored))
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    x = np.random.default_rng(1).normal(size=D).astype(np.float32)
    for i in range(L):
        layer = {name: tensors[f"blk.{i}.{name}.weight"] for name in ("attn_q", "attn_k", "attn_v")}
        for ours, name, heads in (("query", "attn_q", N), ("key", "attn_k", K), ("value", "attn_v", K)):
            got = np.einsum("d,dnh->nh", x, attention[ours]["weight"][i])
            np.testing.assert_allclose(got, (layer[name] @ x).reshape(heads, H), rtol=1e-4, atol=1e-5)
        out = np.einsum("nh,nhd->d", x.reshape(N, H), attention["out"]["weight"][i])
        np.testing.assert_allclose(out, tensors[f"blk.{i}.attn_output.weight"] @ x, rtol=1e-4, atol=1e-5)
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(mlp[name]["weight"][i], tensors[f"blk.{i}.ffn_{name}.weight"].T)
        for ours, name in (("attention_norm", "attn_norm"), ("mlp_norm", "ffn_norm")):
            np.testing.assert_array_equal(
                params["layers"][ours]["scale"][i], tensors[f"blk.{i}.{name}.weight"]
            )
    np.testing.assert_array_equal(params["embedding"]["weight"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(params["final_norm"]["scale"], tensors["output_norm.weight"])
    np.testing.assert_array_equal(params["head"]["weight"], tensors["output.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_the_tree_is_the_decoders(write_gguf, tied):
    params, config = read(write_gguf(tiny_tensors(np.random.default_rng(0), tied)))
    assert config.tied_head == tied

    def described(tree):
        if isinstance(tree, dict):
            return {name: described(value) for name, value in tree.items()}
        return tuple(tree.shape)

    assert described(params) == described(abstract(config))


def test_quantized_weights_are_unpacked(write_gguf, tensors):
    names = ["token_embd.weight", *(f"blk.{i}.ffn_up.weight" for i in range(L))]
    params, _ = read(write_gguf(tensors, quantize=names))
    embedding = params["embedding"]["weight"]
    assert embedding.dtype == np.float32
    step = np.abs(tensors["token_embd.weight"]).max(axis=1, keepdims=True) / 127
    # Half a step by rounding the weight, and a little by rounding the step itself to float16.
    assert (np.abs(embedding - tensors["token_embd.weight"]) <= 0.6 * step).all()
    assert not np.array_equal(embedding, tensors["token_embd.weight"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type='longrope' is not supported; supported: none"),
        ({"rope.scaling.type": "yarn"}, "the field llama.rope.scaling.original_context_length is missing"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 16},
            "the field llama.rope.scaling.factor is missing",
        ),
        ({"expert_count": 8}, "llama.expert_count=8 is not supported"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count=4 is not supported; only 8"),
        ({"block_count": None}, "the field llama.block_count is missing"),
        ({"block_count": 3}, "9 tensors are missing, beginning with blk.2.attn_k.weight"),
        ({"block_count": 1}, "unexpected tensors blk.1.attn_k.weight"),
        ({"feed_forward_length": 32}, r"blk.0.ffn_down.weight has shape \[32, 64\], but .* \[32, 32\]"),
    ],
)
def test_unusable_metadata_is_refused(write_gguf, tensors, fields, message):
    with pytest.raises(ValueError, match=message):
        read(write_gguf(tensors, fields))


def test_fields_of_rope_that_are_unknown_are_said(write_gguf, tensors):
    plain = read(write_gguf(tensors))[1]
    path = write_gguf(tensors, {"rope.scaling.yarn_ext_factor": 0.5})
    with pytest.warns(UserWarning, match=r"unknown fields scaling\.yarn_ext_factor of llama\.rope"):
        assert read(path)[1] == plain


def test_other_architectures_and_features_are_refused(write_gguf, tensors):
    with pytest.raises(ValueError, match="architecture='gemma' is not supported; supported: llama, qwen2, q"):
        read(write_gguf(tensors, architecture="gemma"))
    with pytest.raises(ValueError, match=r"tensors are missing, beginning with blk\.0\.attn_k\.bias"):
        read(write_gguf(tensors | {"blk.0.attn_q.bias": np.zeros(N * H, np.float32)}))
    with pytest.raises(ValueError, match=r"unexpected tensors blk\.1\.attn_q_norm\.weight"):
        read(write_gguf(tensors | {"blk.1.attn_q_norm.weight": np.zeros(H, np.float32)}))
    with pytest.raises(ValueError, match=r"qwen2\.attention\.sliding_window=64 is not supported"):
        read(write_gguf(tensors, {"attention.sliding_window": 64}, architecture="qwen2"))
    del tensors["token_embd.weight"]
    with pytest.raises(ValueError, match=r"token_embd\.weight is missing"):
        read(write_gguf(tensors))


def test_a_window_as_long_as_the_context_is_none(write_gguf, tensors):
    assert read(write_gguf(tensors, {"attention.sliding_window": 128}, architecture="qwen2"))[1].windows == ()


def test_gemma3_27b_scales_queries_by_width_over_heads(write_gguf, tensors):
    fields = {"block_count": 62, "embedding_length": 5376, "attention.head_count": 32}
    path = write_gguf(tensors, fields | {"attention.key_length": 128}, architecture="gemma3")
    assert config_from_gguf(open_gguf(path)).query_scale == pytest.approx(168**-0.5)
    path = write_gguf(
        tensors, fields | {"attention.key_length": 128, "block_count": 48}, architecture="gemma3"
    )
    assert config_from_gguf(open_gguf(path)).query_scale == pytest.approx(128**-0.5)


def test_params_are_made_in_their_own_dtype(write_gguf, tensors):
    path = write_gguf(tensors)
    params, rounded = read(path)[0], read(path, param_dtype="bfloat16")[0]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(y.dtype), y), params, rounded)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(rounded)} == {"bfloat16"}


def test_params_in_int8(write_gguf, tensors):
    params, config = read(write_gguf(tensors), param_dtype="int8")
    plain, _ = read(write_gguf(tensors))
    jax.tree.map(np.testing.assert_array_equal, params, to_storage(plain, config))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), params)
    assert shapes == jax.tree.map(lambda weight: (weight.shape, weight.dtype), abstract(config))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered(write_gguf, tensors, factor):
    wanted = {"rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    fields = {"rope.freq_base": 500_000.0, "attention.key_length": 128}

    def rope(divisors):
        file = open_gguf(write_gguf(tensors | {"rope_freqs.weight": divisors}, fields))
        return config_from_gguf(file).rope

    expected = Rope(500_000.0, "llama3", factor, 8192, 1.0, 4.0)
    assert rope(llama3_divisors(wanted, 128)) == expected
    assert rope(np.ones(64, np.float32)) == Rope(500_000.0)
    for other in (
        llama3_divisors(wanted, 128, original=4096),
        llama3_divisors(wanted | {"high_freq_factor": 8.0}, 128),
        llama3_divisors(wanted, 64),
    ):
        with pytest.raises(ValueError, match=rf"not Llama 3's scaling .* factor {factor:g}\)"):
            rope(other)
