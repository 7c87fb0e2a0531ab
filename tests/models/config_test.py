import dataclasses

import pytest

from espl_jax.models.config import from_hf_config
from tests import tiny

HF = {
    "model_type": "llama",
    "vocab_size": 100,
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 7000.0,
}


def test_fields_of_a_llama():
    config = from_hf_config(HF, dtype="bfloat16")
    assert (config.vocab_size, config.num_layers, config.embed_dim, config.mlp_dim) == (100, 3, 24, 40)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 2, 4)
    assert (config.rope_theta, config.norm_eps, config.max_positions) == (7000.0, 1e-5, 512)
    assert config.tied_head
    assert config.dtype == "bfloat16"


def test_other_spellings_and_defaults():
    new = {**HF, "rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}, "head_dim": 16}
    del new["rope_theta"], new["num_key_value_heads"]
    config = from_hf_config(new)
    assert (config.rope_theta, config.head_dim, config.num_kv_heads) == (9000.0, 16, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type='gemma'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_type='llama3'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(HF | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"matmul_precision": "half"}, "matmul_precision='half' is unknown"),
        ({"dtype": "float16"}, "dtype='float16' is unknown"),
        ({"param_dtype": "int8"}, "param_dtype='int8' is unknown"),
    ],
)
def test_impossible_records_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.CONFIG.replace(**change)


def test_it_is_a_static_argument():
    assert hash(tiny.CONFIG) == hash(tiny.CONFIG.replace())
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.CONFIG.num_layers = 3
