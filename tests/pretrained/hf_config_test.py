import json

import pytest

from espl_jax.models.config import Rope
from espl_jax.pretrained.hf_config import from_hf_config, to_hf_config
from tests.support import families, tiny

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
WIDE = {  # all that no family takes for granted
    "vocab_size": 100,
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 32,
    "intermediate_size": 40,
}


def test_fields_of_a_llama():
    config = from_hf_config(HF, dtype="bfloat16")
    assert (config.vocab_size, config.num_layers, config.embed_dim, config.mlp_dim) == (100, 3, 24, 40)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 2, 4)
    assert (config.rope, config.norm_eps, config.max_positions) == (Rope(7000.0), 1e-5, 512)
    assert config.tied_head
    assert config.dtype == "bfloat16"


def test_other_spellings_and_defaults():
    new = {**HF, "rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}, "head_dim": 16}
    del new["rope_theta"], new["num_key_value_heads"]
    config = from_hf_config(new)
    assert (config.rope.theta, config.head_dim, config.num_kv_heads) == (9000.0, 16, 6)


def test_llama_3_1_as_published():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    config = from_hf_config(HF | {"rope_theta": 500000.0, "rope_scaling": scaling})
    assert config.rope == Rope(500000.0, "llama3", 8.0, 8192, 1.0, 4.0)


def test_yarn_as_qwen_2_5_asks_for_it():
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    config = from_hf_config(
        HF | {"model_type": "qwen2", "rope_scaling": scaling, "max_position_embeddings": 32768}
    )
    assert (config.rope.scaling, config.rope.factor, config.rope.original_positions) == ("yarn", 4.0, 32768)
    assert config.rope.attention_factor == pytest.approx(1.1386294, abs=1e-6)  # 0.1 ln 4 + 1
    assert config.max_positions == 4 * 32768
    assert config.qkv_bias and not config.out_bias


def test_windows():
    assert from_hf_config(HF | {"model_type": "mistral", "sliding_window": 5}).windows == (5, 5, 5)
    assert from_hf_config(HF | {"model_type": "mistral", "sliding_window": None}).windows == ()
    qwen = HF | {"model_type": "qwen2", "sliding_window": 5, "max_window_layers": 2}
    assert from_hf_config(qwen).windows == ()  # only where use_sliding_window says so
    assert from_hf_config(qwen | {"use_sliding_window": True}).windows == (0, 0, 5)


def test_gemma_3_4b_as_published():
    """The text half of a model that sees images too, most of it left to the defaults of the family."""
    config = from_hf_config(
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152},
        }
    )
    assert config.windows[:7] == (1024,) * 5 + (0, 1024)
    assert config.rope == Rope(1e6, "linear", 8.0)
    assert config.local_rope == Rope(1e4)
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert (config.embed_scale, config.query_scale, config.norm_offset) == (2560**0.5, 1 / 16, 1.0)
    assert config.tied_head and config.qk_norm and config.post_norms and config.activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type='gemma' is not supported; supported: llama, mistral"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention=True",
        ),
        ({"hidden_size": None}, "config.json of a llama has no hidden_size"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        (
            {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3},
            "has chunked_attention, which is",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"]},
            "layer_types has 1 entries, but num_hidden",
        ),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "sliding_window is missing, or"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(HF | change)


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.filterwarnings("ignore:config.json")
def test_fields_of_another_type_or_size_are_named(family):
    """All that `to_hf_config` writes as a number, but for those that take any value or are not read."""
    written = to_hf_config(from_hf_config(families.draw_hf_config(family, 0).to_dict()))
    free = {"rope_theta", "rope_local_base_freq", "num_nextn_predict_layers"}
    numbers = {name for name, value in written.items() if type(value) in (int, float)} - free
    assert {"vocab_size", "intermediate_size", "rms_norm_eps"} <= numbers
    for name in sorted(numbers | {"layer_types", "hidden_act", "model_type"} & written.keys()):
        for value in ("8", [8], {"8": 8}, -1):
            with pytest.raises(ValueError) as error:
                from_hf_config(written | {name: value})
            assert str(error.value).startswith(f"{name}={value!r}")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("rope", "missing"),
    [
        (LLAMA3, "factor"),
        (LLAMA3, "low_freq_factor"),
        (LLAMA3, "high_freq_factor"),
        (YARN, "factor"),
        ({"type": "linear"}, "factor"),
    ],
)
@pytest.mark.parametrize("value", ["left out", "8", -1.0])
def test_incomplete_rope_settings(rope, missing, value):
    rope = {name: x for name, x in rope.items() if name != missing}
    rope |= {} if value == "left out" else {missing: value}
    said = repr(None if value == "left out" else value)
    with pytest.raises(
        ValueError, match=rf"rope_parameters\.{missing}={said}: rope_type='\w+' needs a number"
    ):
        from_hf_config(HF | {"rope_scaling": rope})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": None}},
            "rope_theta=None: rope_type='default'",
        ),
        ({"rope_scaling": 4.0}, r"rope_scaling=4\.0: must be a JSON object"),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
            r"low_freq_factor=4\.0: give a number below high_freq",
        ),
        ({"rope_scaling": YARN | {"attention_factor": "1"}}, r"attention_factor='1': rope_type='yarn' needs"),
    ],
)
def test_rope_settings_of_the_wrong_kind(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(HF | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": YARN | {"attn_factor": 2.0}},
            r"rope_type='yarn' has unknown keys \['attn_factor'\]",
        ),
        ({"rope_scaling": {"factor": 2.0}}, r"rope_type='default' has unknown keys \['factor'\]"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            r"rope_parameters has unknown keys \['factor', 'rope_type'\]",
        ),
    ],
)
def test_unknown_rope_settings_are_said_and_ignored(change, message):
    """As in transformers, which warns too."""
    with pytest.warns(UserWarning, match=message):
        config = from_hf_config(HF | change)
    scaling = {"rope_scaling": YARN} if "attn_factor" in message else {}
    assert config == from_hf_config({**HF, **change, "rope_parameters": None, "rope_scaling": None} | scaling)


def test_original_positions_beside_the_rope_settings():
    """Where transformers looks first."""
    config = from_hf_config(HF | {"rope_scaling": YARN, "original_max_position_embeddings": 64})
    assert config.rope.original_positions == 64


def test_yarn_with_a_factor_of_null_is_stretched_to_the_longest_context():
    assert from_hf_config(HF | {"rope_scaling": YARN | {"factor": None}}).rope.factor == 512 / 128


def test_yarn_of_gemma_is_as_transformers_reads_it():
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": False}
    fields = {"model_type": "gemma3_text", "rope_parameters": {"full_attention": yarn}}
    assert from_hf_config(fields).rope.truncate
    fields["rope_parameters"]["truncate"] = False
    assert not from_hf_config(fields).rope.truncate


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_a_file_may_leave_out(family):
    """transformers' own defaults are ours."""
    heads = WIDE["num_attention_heads"]
    deepseek = {"num_hidden_layers": 4, "num_key_value_heads": heads}  # the defaults fit the published model
    given = {"gemma3": {}, "deepseek_v3": WIDE | deepseek}.get(family, WIDE)
    theirs = type(families.draw_hf_config(family, 0))(**given)
    bare = {"model_type": theirs.model_type} | given
    assert from_hf_config(bare) == from_hf_config(theirs.to_dict())


class TestTheWayBack:
    @pytest.mark.parametrize("family", families.FAMILIES)
    @pytest.mark.parametrize("seed", range(20))
    def test_what_is_written_reads_back(self, family, seed):
        config = from_hf_config(families.draw_hf_config(family, seed).to_dict(), dtype="bfloat16")
        written = json.loads(json.dumps(to_hf_config(config)))
        assert from_hf_config(written, dtype="bfloat16") == config

    @pytest.mark.parametrize("family", families.FAMILIES)
    def test_the_older_spelling_alone_reads_back_too(self, family):
        for seed in range(20):
            config = from_hf_config(families.draw_hf_config(family, seed).to_dict())
            written = to_hf_config(config)
            del written["rope_parameters"]
            assert from_hf_config(written) == config

    def test_what_a_family_has_no_words_for(self):
        with pytest.raises(ValueError, match=r"qk_norm=True: a llama config\.json cannot represent it"):
            to_hf_config(tiny.CONFIG.replace(qk_norm=True))
        with pytest.raises(ValueError, match=r"windows=\(3, 5\)"):
            to_hf_config(tiny.CONFIG.replace(family="mistral", windows=(3, 5)))
