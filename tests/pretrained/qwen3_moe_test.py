"""Checkpoints of Qwen3-MoE: one tensor per expert in files, experts of a device on that device, decoding."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from espl_jax.models.params import abstract
from espl_jax.parallel import sharding
from espl_jax.pretrained.hf_config import from_hf_config, to_hf_config
from espl_jax.pretrained.load import load_pretrained
from espl_jax.pretrained.peft import save_adapter
from espl_jax.pretrained.save import save_pretrained
from tests.support import fakes, families, tiny

PUBLISHED = {  # Qwen3-30B-A3B, without fields that do not matter here
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_as_published():
    config = from_hf_config(PUBLISHED)
    experts = config.experts
    assert experts is not None
    assert (experts.count, experts.active, experts.mlp_dim, experts.normalize) == (128, 8, 768, True)
    assert config.qk_norm and not config.qkv_bias and not config.windows
    size = sum(int(np.prod(weight.shape)) for weight in jax.tree.leaves(abstract(config)))
    assert size == pytest.approx(30.5e9, rel=0.01)
    written = to_hf_config(config)
    assert written["architectures"] == ["Qwen3MoeForCausalLM"]
    assert {name: written.get(name) for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize(("field", "value"), [("decoder_sparse_step", 2), ("mlp_only_layers", [0])])
def test_dense_layers_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field}=.* is not supported: it makes some layers dense"):
        from_hf_config(PUBLISHED | {field: value})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = families.our_config(families.draw_hf_config("qwen3_moe", 1)).replace(vocab_size=259)
    path = tmp_path_factory.mktemp("models") / "moe"
    params = tiny.params(config)
    save_pretrained(path, params, config, fakes.tokenizer())
    return path, params, config


def test_one_tensor_per_expert(folder):
    path, params, config = folder
    tensors = load_file(path / "model.safetensors")
    mlp = params["layers"]["mlp"]
    for layer, expert in np.ndindex(config.num_layers, config.experts.count):
        name = f"model.layers.{layer}.mlp.experts.{expert}."
        np.testing.assert_array_equal(tensors[f"{name}up_proj.weight"], mlp["up"]["weight"][layer, expert].T)
        np.testing.assert_array_equal(
            tensors[f"{name}down_proj.weight"], mlp["down"]["weight"][layer, expert].T
        )
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.gate.weight"], mlp["router"]["weight"][1].T)


def test_experts_are_loaded_where_they_belong(folder):
    path, params, config = folder
    count = config.experts.count
    size = next(n for n in (8, 4, 2, 1) if count % n == 0)
    mesh = sharding.make_mesh({"expert": size, "data": -1})
    back = load_pretrained(path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    for shard in back.params["layers"]["mlp"]["gate"]["weight"].addressable_shards:
        assert shard.data.shape[1] == count // size


def test_adapters_of_gate_without_up_are_refused(folder, tmp_path):
    config = folder[2]
    adapters = tiny.adapters(config, targets=("gate", "query"))
    with pytest.raises(ValueError, match="only one of gate and up; train both"):
        save_adapter(tmp_path / "a", adapters, config, fakes.tokenizer(), base="a/b")


@pytest.mark.slow
def test_greedy_decoding(folder):
    families.assert_decodes_as_transformers(*folder)
