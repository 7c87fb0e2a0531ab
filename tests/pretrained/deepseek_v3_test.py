"""Checkpoints of DeepSeek-V3: the published configuration, matrices in FP8, layers not read, decoding."""

import json
import math

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from espl_jax.models.config import DecoderConfig, Experts, Latent, Rope
from espl_jax.models.params import abstract, to_storage
from espl_jax.parallel import sharding
from espl_jax.pretrained.hf_config import from_hf_config, to_hf_config
from espl_jax.pretrained.load import load_pretrained
from espl_jax.pretrained.save import save_pretrained
from tests.support import fakes, families, tiny

PUBLISHED = {  # DeepSeek-V3 and R1, without fields that do not matter here
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
BLOCK = [8, 8]
CONFIG = DecoderConfig(  # all widths are multiples of a block's, as transformers requires
    family="deepseek_v3",
    vocab_size=fakes.CONFIG.vocab_size,
    num_layers=3,
    embed_dim=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=12,
    mlp_dim=40,
    rope=Rope(scaling="yarn", factor=4.0, original_positions=32, interleaved=True),
    query_scale=0.4,
    max_positions=512,
    latent=Latent(kv_rank=16, rope_dim=8, value_dim=8, query_rank=16),
    experts=Experts(
        *(4, 2, 16), scores="sigmoid", scale=2.5, corrected=True, groups=2, active_groups=1, shared_dim=16
    ),
    first_dense=1,
)


def test_as_published():
    config = from_hf_config(PUBLISHED)
    assert config.experts == Experts(
        *(256, 8, 2048),
        scores="sigmoid",
        scale=2.5,
        corrected=True,
        groups=8,
        active_groups=4,
        shared_dim=2048,
    )
    assert config.latent == Latent(kv_rank=512, rope_dim=64, value_dim=128, query_rank=1536)
    assert config.head_dim == 192 and config.first_dense == 3 and config.rope.interleaved
    # YaRN scales the scores by (0.1 ln 40 + 1)^2, and cosines and sines by mscale over mscale_all_dim.
    assert config.query_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert config.rope.attention_factor == 1.0
    every = jax.tree.leaves(abstract(config))
    sizes = [math.prod(weight.shape) for weight in every]
    active = [
        size * 8 / 256 if "experts" in weight.axes else size
        for weight, size in zip(every, sizes, strict=True)
    ]
    assert sum(sizes) == pytest.approx(671e9, rel=0.001)
    assert sum(active) == pytest.approx(37e9, rel=0.02)
    written = to_hf_config(config)
    assert written["architectures"] == ["DeepseekV3ForCausalLM"]
    kept = PUBLISHED.keys() - {"rope_scaling", "num_nextn_predict_layers"}
    assert {name: written.get(name) for name in kept} == {name: PUBLISHED[name] for name in kept}
    assert written["num_nextn_predict_layers"] == 0
    scaling = PUBLISHED["rope_scaling"] | {"rope_type": "yarn"}
    assert written["rope_scaling"].items() >= (scaling.items() - {("type", "yarn")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported for deepseek_v3"),
        ({"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        ({"num_key_value_heads": 64}, "num_key_value_heads=64: in latent attention each head"),
        ({"first_k_dense_replace": 61}, "first_dense=61: give .* at most num_layers-1=60"),
        ({"n_group": 7}, "experts groups=7: count=256 must divide into equal groups"),
        ({"topk_group": 9}, "experts active_groups=9: give at least 1, and at most groups=8"),
        ({"qk_rope_head_dim": 63}, "latent rope_dim=63: rotation needs pairs"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}}, "mscale_all_dim=1.0"),
    ],
)
@pytest.mark.filterwarnings("ignore:config.json. rope_parameters")
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(PUBLISHED | change)


def test_a_decoder_without_latents_is_not_of_the_family():
    with pytest.raises(ValueError, match="family='deepseek_v3': needs latent attention and experts"):
        to_hf_config(fakes.CONFIG.replace(family="deepseek_v3"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "plain"
    params = tiny.params(CONFIG)
    save_pretrained(path, params, CONFIG, fakes.tokenizer())
    return path, params


def test_names_and_layers(plain):
    path, params = plain
    tensors = load_file(path / "model.safetensors")
    # The dense layer is layer 0 of the model, and the first with experts is layer 1.
    up = params["first_layers"]["mlp"]["up"]["weight"][0]
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"], up.T)
    for layer, expert in np.ndindex(2, 4):
        up = params["layers"]["mlp"]["up"]["weight"][layer, expert]
        name = f"model.layers.{layer + 1}.mlp.experts.{expert}.up_proj.weight"
        np.testing.assert_array_equal(tensors[name], up.T)
    down = params["layers"]["attention"]["kv_down"]["weight"][1]
    np.testing.assert_array_equal(tensors["model.layers.2.self_attn.kv_a_proj_with_mqa.weight"], down.T)


def test_the_correction_of_a_choice_is_never_rounded(plain, tmp_path):
    save_pretrained(tmp_path / "out", plain[1], CONFIG, fakes.tokenizer(), dtype="bfloat16")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    stored = load_torch(tmp_path / "out" / "model.safetensors")
    assert stored[name].dtype == torch.float32 and stored["lm_head.weight"].dtype == torch.bfloat16
    back = load_pretrained(tmp_path / "out", param_dtype="bfloat16").params["layers"]["mlp"]["router"]
    correction = plain[1]["layers"]["mlp"]["router"]["correction"]
    np.testing.assert_array_equal(back["correction"], correction)


def in_fp8(tensors, block):
    """Quantizes as DeepSeek does: every linear layer but the router and the head; others are bfloat16."""
    stored = {}
    for name, x in tensors.items():
        if x.ndim < 2 or name.endswith(("mlp.gate.weight", "lm_head.weight", "embed_tokens.weight")):
            stored[name] = x if name.endswith("correction_bias") else x.to(torch.bfloat16)
            continue
        rows, columns = (-(-size // part) for size, part in zip(x.shape, block, strict=True))
        scales, elements = torch.zeros(rows, columns), torch.zeros(x.shape, dtype=torch.float8_e4m3fn)
        for i, j in np.ndindex(rows, columns):
            part = tuple(slice(k * size, (k + 1) * size) for k, size in zip((i, j), block, strict=True))
            scales[i, j] = x[part].abs().max() / 448
            elements[part] = (x[part] / scales[i, j]).to(torch.float8_e4m3fn)
        stored |= {name: elements, f"{name}_scale_inv": scales}
    return stored


def written_in_fp8(folder, plain, block=BLOCK, extra=(), leave_out=()):
    """The model of `plain` in FP8."""
    tensors = in_fp8(load_torch(plain / "model.safetensors"), block) | dict(extra)
    folder.mkdir()
    save_torch(
        {name: x for name, x in tensors.items() if name not in leave_out}, folder / "model.safetensors"
    )
    fields = json.loads((plain / "config.json").read_text())
    fields["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": block,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    for file in plain.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    return written_in_fp8(tmp_path_factory.mktemp("models") / "fp8", plain[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_is_read_as_transformers_reads_it(quantized, dtype):
    """Bit for bit; transformers has no FP8 products on a CPU and dequantizes as well."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quantized, dtype=getattr(torch, dtype))
    theirs = {name: x.float().numpy() for name, x in model.state_dict().items()}
    back = load_pretrained(quantized, param_dtype=dtype)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), back.params)
    ours, theirs = families.by_hf_names(params, back.config), families.each_expert(theirs)
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)


def test_blocks_at_the_end_of_a_matrix_are_smaller(plain, tmp_path):
    """Blocks of 5 rows and 7 columns of a matrix of 24 and 32."""
    folder = written_in_fp8(tmp_path / "odd", plain[0], block=[5, 7])
    stored = load_torch(folder / "model.safetensors")
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    elements, scales = stored[name].float().numpy(), stored[f"{name}_scale_inv"].numpy()
    assert scales.shape == (5, 5) and elements.shape == (24, 32)
    wanted = np.array([[elements[i, j] * scales[i // 5, j // 7] for j in range(32)] for i in range(24)])
    down = load_pretrained(folder).params["layers"]["attention"]["kv_down"]["weight"][0]
    np.testing.assert_array_equal(down.T, wanted)


def test_fp8_is_loaded_by_shards(quantized):
    mesh = sharding.make_mesh({"expert": 2, "fsdp": 2, "tensor": 2})
    back, whole = load_pretrained(quantized, mesh=mesh), load_pretrained(quantized)
    jax.tree.map(np.testing.assert_array_equal, back.params, whole.params)
    gate = back.params["layers"]["mlp"]["gate"]["weight"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 2, 32, 4)}


def test_fp8_to_int8(quantized):
    """Dequantized, and then rounded."""
    mesh = sharding.make_mesh({"expert": 2, "fsdp": 2, "tensor": 2})
    back, whole = load_pretrained(quantized, mesh=mesh, param_dtype="int8"), load_pretrained(quantized)
    wanted = to_storage(jax.device_get(whole.params), back.config)
    jax.tree.map(np.testing.assert_array_equal, back.params, wanted)


def test_damaged_fp8(plain, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    scales = f"{name}_scale_inv"
    folder = written_in_fp8(tmp_path / "without", plain[0], leave_out=[scales])
    with pytest.raises(ValueError, match=rf"{name} is FP8 without {scales}; download"):
        load_pretrained(folder)
    folder = written_in_fp8(tmp_path / "other", plain[0], extra={scales: torch.ones(2, 3)})
    with pytest.raises(ValueError, match=rf"{scales} is \[2, 3\] in F32; use files of the same model"):
        load_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"]["weight_block_size"] = None
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="weight_block_size=None is not supported"):
        load_pretrained(folder)


def test_a_head_in_fp8_is_read_though_the_config_ties_it(plain, tmp_path):
    head = load_torch(plain[0] / "model.safetensors")["lm_head.weight"]
    scales = torch.full([-(-size // part) for size, part in zip(head.shape, BLOCK, strict=True)], 2.0)
    extra = {"lm_head.weight": head.to(torch.float8_e4m3fn), "lm_head.weight_scale_inv": scales}
    folder = written_in_fp8(tmp_path / "tied", plain[0], extra=extra)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    back = load_pretrained(folder)
    assert not back.config.tied_head
    np.testing.assert_array_equal(back.params["head"]["weight"], 2 * extra["lm_head.weight"].float().numpy())


def test_layers_that_predict_further_tokens_are_not_read(plain, tmp_path):
    """The published files have one after the last layer; any other layer too many is an error."""
    last = {f"model.layers.3.{name}": torch.ones(2, 2) for name in ("eh_proj.weight", "mlp.up_proj.weight")}
    folder = written_in_fp8(tmp_path / "predicts", plain[0], extra=last)
    assert load_pretrained(folder).config.num_layers == 3
    del last["model.layers.3.eh_proj.weight"]
    folder = written_in_fp8(tmp_path / "has_more", plain[0], extra=last)
    with pytest.raises(ValueError, match=r"1 tensors .* not part of a deepseek_v3 decoder"):
        load_pretrained(folder)


@pytest.mark.slow
def test_greedy_decoding(plain):
    families.assert_decodes_as_transformers(*plain, CONFIG)
