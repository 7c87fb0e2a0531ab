"""Every family, written as llama.cpp's converter writes it and read back, against transformers and torch."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from espl_jax.pretrained.gguf.config import config_from_gguf
from espl_jax.pretrained.gguf.file import open_gguf
from espl_jax.pretrained.gguf.weights import params_from_gguf
from tests.pretrained.gguf.tiny_gguf import write_as_llama_cpp
from tests.support import families, tiny

TINY = {
    "vocab_size": families.VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
GLOBAL, LOCAL = {"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e4}


def gemma3(**fields):
    fields = TINY | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4} | fields
    return Gemma3TextConfig(**fields)


CASES = {
    "llama": (LlamaConfig(**TINY, head_dim=10, rope_parameters=LLAMA3), {}),
    "llama_biases": (LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), {}),
    "llama_linear": (LlamaConfig(**TINY, rope_parameters=LINEAR), {}),
    "mistral": (MistralConfig(**TINY, head_dim=8, sliding_window=5), {"attention.sliding_window": 5}),
    "qwen2": (Qwen2Config(**TINY, use_sliding_window=False), {}),
    "qwen2_yarn": (Qwen2Config(**TINY, rope_parameters=YARN, tie_word_embeddings=True), {}),
    "qwen3": (Qwen3Config(**TINY, head_dim=8), {}),
    "gemma3_every_sixth_layer": (
        gemma3(
            num_hidden_layers=7,
            rope_parameters={"full_attention": LINEAR, "sliding_attention": LOCAL},
        ),
        {"attention.sliding_window": 4},
    ),
    "gemma3_pattern": (
        gemma3(
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={"full_attention": GLOBAL, "sliding_attention": LOCAL | {"rope_theta": 300.0}},
            tie_word_embeddings=False,
        ),
        {
            "attention.sliding_window": 4,
            "attention.sliding_window_pattern": [True, False, True],
            "rope.freq_base_swa": 300.0,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_family(tmp_path, case):
    hf, fields = CASES[case]
    model = families.torch_model(hf, seed=3)
    write_as_llama_cpp(tmp_path / "model.gguf", model, **fields)
    file = open_gguf(tmp_path / "model.gguf")
    config = config_from_gguf(file)
    expected = families.our_config(hf)
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(expected, field.name)
        if field.name == "query_scale":
            ours, theirs = (scale or config.head_dim**-0.5 for scale in (ours, theirs))
        if isinstance(theirs, float):
            ours, theirs = pytest.approx(ours, rel=1e-6), theirs
        assert ours == theirs, field.name

    params = params_from_gguf(file, config)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=3e-7),
        params,
        families.our_params(model, config),
    )
    tokens = np.random.default_rng(0).integers(0, families.VOCABULARY, (2, 20), dtype=np.int32)
    with torch.no_grad():
        wanted = families.torch_logits(model, tokens).numpy()
    got = np.asarray(tiny.logits(params, config.replace(remat="none"), tokens))
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
