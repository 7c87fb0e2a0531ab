"""Checkpoints of gpt-oss: published configurations, fused and quantized experts, decoding."""

import json
import math

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from espl_jax.models import lora, rope
from espl_jax.models.params import abstract, to_storage
from espl_jax.parallel import sharding
from espl_jax.pretrained import hf_folder
from espl_jax.pretrained.hf_config import from_hf_config, to_hf_config
from espl_jax.pretrained.load import load_pretrained
from espl_jax.pretrained.peft import load_adapter
from espl_jax.pretrained.save import save_pretrained
from tests.support import fakes, families, tiny

LAYERS = {"gpt-oss-20b": 24, "gpt-oss-120b": 36}


def published(name):
    """config.json, without fields that do not matter here."""
    layers = LAYERS[name]
    return {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": {"gpt-oss-20b": 32, "gpt-oss-120b": 128}[name],
        "quantization_config": {
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }


@pytest.mark.parametrize(
    ("name", "total", "active"), [("gpt-oss-20b", 20.91e9, 3.61e9), ("gpt-oss-120b", 116.83e9, 5.13e9)]
)
def test_as_published(name, total, active):
    """Parameters, and those that a token uses, as in table 1 of the model card (arXiv 2508.10925)."""
    fields = published(name)
    config = from_hf_config(fields)
    assert config.experts is not None and config.experts.bias and config.experts.normalize
    assert config.windows == (128, 0) * (LAYERS[name] // 2)
    assert config.attention_sinks and config.qkv_bias and config.out_bias
    assert (config.activation, config.swiglu_limit, config.swiglu_alpha) == ("clamped_swiglu", 7.0, 1.702)
    weights = jax.tree.leaves(abstract(config))
    assert sum(math.prod(w.shape) for w in weights) == pytest.approx(total, abs=0.005e9)
    unused = 1 - config.experts.active / config.experts.count
    used = sum(math.prod(w.shape) * (1 - unused * ("experts" in w.axes)) for w in weights)
    # The card counts the output head, and not the embedding.
    assert used - config.vocab_size * config.embed_dim == pytest.approx(active, abs=0.01e9)
    written = to_hf_config(config)
    assert written["architectures"] == ["GptOssForCausalLM"]
    assert written["rope_scaling"].items() >= fields.pop("rope_scaling").items()
    for name in ("quantization_config", "experts_per_token", "initial_context_length"):
        del fields[name]
    assert {name: written[name] for name in fields} == fields


def test_yarn_as_published():
    fields = {
        name: value for name, value in published("gpt-oss-20b").items() if name != "quantization_config"
    }
    ours, theirs = from_hf_config(fields), GptOssConfig(**fields)
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    np.testing.assert_allclose(rope.frequencies(ours.rope, 64), expected, rtol=1e-6)
    assert ours.rope.attention_factor == pytest.approx(scale)
    # What transformers assumes for a file without RoPE.
    assert from_hf_config({**fields, "rope_scaling": None}).rope == ours.rope
    assert from_hf_config({name: x for name, x in fields.items() if name != "rope_scaling"}).rope == ours.rope


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = families.our_config(families.draw_hf_config("gpt_oss", 1)).replace(vocab_size=259)
    path = tmp_path_factory.mktemp("models") / "moe"
    params = tiny.params(config)
    save_pretrained(path, params, config, fakes.tokenizer())
    return path, params, config


def test_all_experts_in_one_tensor(folder):
    path, params, config = folder
    tensors, mlp = load_file(path / "model.safetensors"), params["layers"]["mlp"]
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}.mlp."
        for leaf, end in (("weight", ""), ("bias", "_bias")):
            both = tensors[f"{name}experts.gate_up_proj{end}"]
            np.testing.assert_array_equal(both[..., ::2], mlp["gate"][leaf][layer])
            np.testing.assert_array_equal(both[..., 1::2], mlp["up"][leaf][layer])
            np.testing.assert_array_equal(tensors[f"{name}experts.down_proj{end}"], mlp["down"][leaf][layer])
        np.testing.assert_array_equal(tensors[f"{name}router.weight"], mlp["router"]["weight"][layer].T)
        sinks = params["layers"]["attention"]["sinks"]["logit"][layer]
        np.testing.assert_array_equal(tensors[f"model.layers.{layer}.self_attn.sinks"], sinks)


@pytest.mark.parametrize("sizes", [{"expert": 8}, {"expert": 2, "tensor": 2, "fsdp": 2}], ids=str)
def test_experts_are_loaded_where_they_belong(folder, sizes):
    path, params, config = folder
    mesh = sharding.make_mesh(sizes)
    back = load_pretrained(path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    for shard in back.params["layers"]["mlp"]["gate"]["weight"].addressable_shards:
        assert shard.data.shape[1] == config.experts.count // sizes["expert"]


def quantized(folder, tmp_path, width=64, mlp_dim=96):
    """A checkpoint like the published ones: experts in MXFP4, the rest in bfloat16. Returns its path, and the
    experts as transformers dequantizes them."""
    config = folder[2]
    config = config.replace(
        embed_dim=width, mlp_dim=mlp_dim, experts=config.experts.__class__(4, 2, mlp_dim, bias=True)
    )
    path = tmp_path / "mxfp4"
    save_pretrained(path, tiny.params(config), config, fakes.tokenizer(), dtype="bfloat16")
    tensors, rng, dequantized = load_file(path / "model.safetensors"), np.random.default_rng(0), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        scales = rng.integers(118, 126, blocks.shape[:3], np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dequantized[name] = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    save_file(tensors, path / "model.safetensors")
    fields = json.loads((path / "config.json").read_text())
    fields["quantization_config"] = published("gpt-oss-20b")["quantization_config"]
    (path / "config.json").write_text(json.dumps(fields))
    return path, dequantized


@pytest.mark.parametrize("sizes", [None, {"fsdp": 8}, {"expert": 2, "tensor": 2, "fsdp": 2}], ids=str)
def test_mxfp4_is_dequantized_as_by_transformers(folder, tmp_path, sizes):
    """Bit for bit, on shards of widths that cut through blocks."""
    path, dequantized = quantized(folder, tmp_path)
    model = load_pretrained(path, param_dtype="bfloat16", mesh=sizes and sharding.make_mesh(sizes))
    mlp = model.params["layers"]["mlp"]
    for layer in range(model.config.num_layers):
        name = f"model.layers.{layer}.mlp.experts."
        ours = np.stack([mlp[kind]["weight"][layer] for kind in ("gate", "up")], -1)
        pairs = {"gate_up_proj": ours.reshape(*ours.shape[:2], -1), "down_proj": mlp["down"]["weight"][layer]}
        for kind, matrix in pairs.items():
            theirs = dequantized[f"{name}{kind}"].contiguous().view(torch.int16).numpy()
            np.testing.assert_array_equal(np.asarray(matrix).view(np.int16), theirs)


@pytest.mark.parametrize("sizes", [None, {"expert": 2, "tensor": 2, "fsdp": 2}], ids=str)
def test_mxfp4_to_int8(folder, tmp_path, sizes):
    """Dequantized, and then rounded."""
    path, _ = quantized(folder, tmp_path)
    mesh = sizes and sharding.make_mesh(sizes)
    model, whole = load_pretrained(path, param_dtype="int8", mesh=mesh), load_pretrained(path)
    wanted = to_storage(jax.device_get(whole.params), model.config)
    jax.tree.map(np.testing.assert_array_equal, model.params, wanted)


def test_mxfp4_logits_and_export(folder, tmp_path):
    """transformers loads the same checkpoint, and what we write of it, unquantized."""
    path, _ = quantized(folder, tmp_path)
    model = load_pretrained(path, param_dtype="bfloat16")
    out = tmp_path / "out"
    save_pretrained(out, model.params, model.config, fakes.tokenizer())
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    ours = np.asarray(tiny.logits(model.params, model.config, np.arange(24).reshape(2, 12)))
    for source in (path, out):
        theirs = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        with torch.no_grad():
            expected = families.torch_logits(theirs, np.arange(24).reshape(2, 12)).numpy()
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def break_scales(tensors, name):
    del tensors[f"{name}_scales"]


def break_shape(tensors, name):
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"][:, :-1]


def break_rank(tensors, name):
    for kind in ("blocks", "scales"):
        tensors[f"{name}_{kind}"] = tensors[f"{name}_{kind}"][None]


def break_bias(tensors, name):
    tensors[f"{name}_bias"] = np.ones((), np.float32)


def break_count(tensors, name):
    for kind in ("blocks", "scales"):
        tensors[f"{name}_{kind}"] = tensors[f"{name}_{kind}"][:-1]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (break_scales, "1 tensors .model.layers.0.mlp.experts.down_proj. are missing"),
        (break_shape, r"down_proj_blocks and its scales are U8 \[4, 64, 3, 16\] and U8 \[4, 63, 3\]"),
        (break_rank, r"U8 \[1, 4, 64, 3, 16\] and U8 \[1, 4, 64, 3\], but MXFP4 needs U8"),
        (break_bias, "1 tensors .model.layers.0.mlp.experts.down_proj_bias. are missing"),
        (break_count, "1 tensors .model.layers.0.mlp.experts.down_proj. are missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused(folder, tmp_path, change, error):
    path, _ = quantized(folder, tmp_path)
    tensors = load_file(path / "model.safetensors")
    change(tensors, "model.layers.0.mlp.experts.down_proj")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=error):
        load_pretrained(path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq' is not supported"),
        ({"quantization_config": "mxfp4"}, "quantization_config='mxfp4': must be a JSON object; use"),
        ({"quantization_config": None, "text_config": [1]}, r"text_config=\[1\]: must be a JSON object; use"),
    ],
)
def test_other_quantizations_are_refused(tmp_path, change, error):
    (tmp_path / "config.json").write_text(json.dumps(published("gpt-oss-20b") | change))
    with pytest.raises(ValueError, match=error):
        hf_folder.described(tmp_path)


def peft_model(folder, **settings):
    """The model with random adapters of PEFT."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    model = AutoModelForCausalLM.from_pretrained(
        folder[0], attn_implementation="eager", experts_implementation="eager"
    )
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=2, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return adapted


@pytest.mark.parametrize(
    ("modules", "parameters"),
    [
        (["q_proj", "o_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ([], ["mlp.experts.gate_up_proj"]),
        ([], ["mlp.experts.down_proj"]),
    ],
)
def test_adapters_that_peft_trained(folder, tmp_path, modules, parameters):
    """Gate and up share the factor A of gate_up_proj, at the same rank as the others."""
    adapted = peft_model(folder, target_modules=modules, target_parameters=parameters)
    adapted.save_pretrained(tmp_path)
    adapters, scale = load_adapter(tmp_path, folder[2])
    policy, tokens = lora.attach(folder[1], adapters), np.arange(24).reshape(2, 12)
    ours = tiny.logits(policy, folder[2].replace(lora_scale=scale), tokens)
    with torch.no_grad():
        expected = families.torch_logits(adapted, tokens).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("patterns", "error"),
    [
        ({"rank_pattern": {"gate_up_proj": 6}}, "all adapters must have one scale; merge"),
        (
            {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 4}},
            "only gate_up_proj may",
        ),
        (
            {"rank_pattern": {"gate_up_proj": 6}, "alpha_pattern": {"gate_up_proj": 4}},
            "has rank 6, and gate and up share it",
        ),
        (
            {"rank_pattern": {"gate_up_proj": 9}, "alpha_pattern": {"gate_up_proj": 6}},
            "but r=3 and 8",
        ),
    ],
)
def test_adapters_of_other_ranks_are_refused(folder, tmp_path, patterns, error):
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = peft_model(folder, target_modules=["q_proj"], target_parameters=parameters, **patterns)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=error):
        load_adapter(tmp_path, folder[2])


@pytest.mark.slow
def test_greedy_decoding(folder):
    families.assert_decodes_as_transformers(*folder)
