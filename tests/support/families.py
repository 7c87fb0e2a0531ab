"""Random tiny models of every family: transformers' own, and the same weights as our params."""

import jax
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from espl_jax.models.params import abstract
from espl_jax.pretrained import hf_names, layout
from espl_jax.pretrained.hf_config import from_hf_config
from espl_jax.sampling.generate import generate

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "qwen3_moe", "gpt_oss", "deepseek_v3")

SCALINGS = ("default", "linear", "llama3", "yarn")

VOCABULARY, LENGTH = 97, 40
"""A prime, so that it passes for no other axis; and how long the sequences of the tests can get."""


def draw_hf_config(family, seed):
    """Draws a tiny transformers configuration, randomizing everything that the family leaves open.

    Neighbouring seeds take turns in tying the head, in RoPE's scaling and in windows, so that any four of
    them show all.
    """
    turn = FAMILIES.index(family) + seed
    rng = np.random.default_rng([FAMILIES.index(family), seed])

    def chance(p=0.5):
        return bool(rng.random() < p)

    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 4))
    layers = int(rng.integers(2, 5))
    head_dim = 2 * int(rng.integers(2, 7))
    # The width is a multiple of the heads, as transformers wants it, but heads * head_dim only for qwen2.
    width = heads * (head_dim if family == "qwen2" else int(rng.integers(3, 9)))
    theta = float(rng.choice([50.0, 500.0, 10_000.0]))
    window = int(rng.integers(2, 12))
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": int(rng.integers(5, 50)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": bool(turn % 2),
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_theta": theta, **_draw_scaling(rng, SCALINGS[turn % 4])},
        "pad_token_id": None,  # torch drops the gradient of a padding token's embedding
    }
    kinds = ["sliding_attention" if chance() else "full_attention" for _ in range(layers)]
    if family != "qwen2":
        fields["head_dim"] = head_dim
    if family == "qwen3_moe":
        experts, normalize = int(rng.integers(2, 9)), bool(turn % 2)
        return transformers.Qwen3MoeConfig(
            **fields,
            attention_bias=chance(0.3),
            use_sliding_window=bool(seed // 2 % 2),
            sliding_window=window,
            num_experts=experts,
            # The normalized weight of a single expert is 1: its router would have no gradient.
            num_experts_per_tok=int(rng.integers(1 + normalize, experts + 1)),
            moe_intermediate_size=int(rng.integers(5, 30)),
            norm_topk_prob=normalize,
        )
    if family == "gpt_oss":
        experts = int(rng.integers(2, 9))
        if fields["rope_parameters"]["rope_type"] == "yarn":
            fields["rope_parameters"]["truncate"] = False
        return transformers.GptOssConfig(
            **fields,
            attention_bias=chance(0.7),
            layer_types=["sliding_attention", *kinds[1:-1], "full_attention"],
            sliding_window=window,
            num_local_experts=experts,
            num_experts_per_tok=int(rng.integers(2, experts + 1)),
            # Low enough that some activations reach it.
            swiglu_limit=float(rng.choice([0.5, 1.0, 7.0])),
        )
    if family == "deepseek_v3":
        return _draw_deepseek(rng, fields, turn)
    if family == "llama":
        fields |= {"attention_bias": chance(0.3), "mlp_bias": chance(0.3)}
        return transformers.LlamaConfig(**fields)
    if family == "mistral":
        return transformers.MistralConfig(**fields, sliding_window=window if turn % 4 else None)
    if family == "gemma3":
        scaled = fields.pop("rope_parameters")
        local = {"rope_theta": 3 * theta, "rope_type": "default"}
        return transformers.Gemma3TextConfig(
            **fields,
            rope_parameters={"full_attention": scaled, "sliding_attention": local},
            layer_types=["sliding_attention", *kinds[1:-1], "full_attention"],
            sliding_window=window,
            query_pre_attn_scalar=int(rng.integers(4, 40)),
        )
    fields |= {"use_sliding_window": bool(seed // 2 % 2), "sliding_window": window, "layer_types": None}
    if fields["use_sliding_window"]:
        fields["layer_types"] = ["sliding_attention", *kinds[1:]]
    if family == "qwen2":
        return transformers.Qwen2Config(**fields)
    return transformers.Qwen3Config(**fields, attention_bias=chance(0.3))


def _draw_deepseek(rng, fields, turn):
    """Draws latents, groups and the number of dense layers too, which take turns as well."""
    groups = int(rng.integers(2, 4)) if turn % 2 else 1
    experts, normalize = groups * int(rng.integers(2, 4)), bool(turn % 2)
    active_groups = int(rng.integers(1, groups + 1))
    scaling = fields["rope_parameters"]
    if scaling["rope_type"] == "yarn":
        scaling |= {"mscale": float(rng.choice([0.7, 1.0])), "mscale_all_dim": float(rng.choice([0.5, 1.0]))}
    del fields["head_dim"]
    return transformers.DeepseekV3Config(
        **fields | {"num_key_value_heads": fields["num_attention_heads"]},
        attention_bias=bool(rng.random() < 0.3),
        q_lora_rank=int(rng.integers(3, 20)) if turn % 3 else None,
        kv_lora_rank=int(rng.integers(3, 20)),
        qk_nope_head_dim=int(rng.integers(2, 9)),
        qk_rope_head_dim=2 * int(rng.integers(2, 5)),
        v_head_dim=int(rng.integers(2, 12)),
        rope_interleave=turn % 4 != 2,
        first_k_dense_replace=min(turn % 3, fields["num_hidden_layers"] - 1),
        n_routed_experts=experts,
        n_group=groups,
        topk_group=active_groups,
        # The normalized weight of a single expert is 1: its router would have no gradient.
        num_experts_per_tok=int(rng.integers(2, active_groups * experts // groups + 1)),
        moe_intermediate_size=int(rng.integers(5, 30)),
        n_shared_experts=int(rng.integers(1, 3)),
        routed_scaling_factor=float(rng.choice([1.0, 2.5])),
        norm_topk_prob=normalize,
    )


def _draw_scaling(rng, kind):
    scaling = {"rope_type": kind}
    if kind != "default":
        scaling["factor"] = float(rng.choice([1.5, 4.0, 8.0]))
    if kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = int(rng.integers(8, 40))
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "yarn" and rng.random() < 0.5:
        scaling |= {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.3}
    return scaling


def torch_model(hf_config, seed):
    """transformers' model in float32 with every weight drawn, norms and biases too."""
    model = AutoModelForCausalLM.from_config(
        hf_config,
        attn_implementation="eager",
        experts_implementation="eager",  # grouped needs wide experts
    )
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights_of(model).items():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.data = noise * weight.shape[-1] ** -0.5
        else:
            weight.data = 0.3 * noise + (0 if name.endswith(("bias", "sinks")) else weight.data)
    return model


def weights_of(model):
    """Returns the tensors by name, with the biases that correct the choice of experts, which torch has as
    buffers."""
    corrections = {name: x for name, x in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return dict(model.named_parameters()) | corrections


def gradients_of(model):
    """Returns the gradients of `weights_of`; zero for buffers."""
    return {
        name: np.zeros(weight.shape) if weight.grad is None else weight.grad.numpy()
        for name, weight in weights_of(model).items()
    }


def our_config(hf_config, **numerics):
    """What we read from the configuration as it is saved."""
    return from_hf_config(hf_config.to_dict(), **numerics)


def our_params(model, config):
    """The model's weights as our params."""
    state = each_expert({name: weight.detach().numpy() for name, weight in weights_of(model).items()})
    names, declared = hf_names.names(config), abstract(config)
    every = hf_names.by_path(declared)
    assert {x for path, name in names.items() for x in hf_names.stacked(name, every[path])} == set(state)

    def read(path, weight):
        group = hf_names.stacked(names["/".join(key.key for key in path)], weight)
        return np.stack([layout.from_file(weight, state[name]) for name in group]).reshape(weight.shape)

    return jax.tree_util.tree_map_with_path(read, declared)


def by_hf_names(tree, config):
    """Params, or their gradients, by the names and in the layouts of transformers."""
    declared, named = hf_names.by_path(abstract(config)), {}
    leaves = hf_names.by_path(tree)
    for path, name in hf_names.names(config).items():
        leaf = np.asarray(leaves[path])
        places = np.ndindex(*declared[path].stack_shape)
        for index, numbers in zip(places, declared[path].members, strict=True):
            named[name.format(*numbers)] = layout.to_file(declared[path], leaf[index])
    return named


def each_expert(tensors):
    """Tensors of transformers by the name of each expert: its models fuse the experts of a layer.

    gpt-oss's have inputs first, the columns of gate and up by turns, and biases.
    """
    named = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if f"{module}.gate_up_proj_bias" in tensors:
            kind = leaf.removesuffix("_bias")
            parts = {"gate_proj": (0, 2), "up_proj": (1, 2)} if kind == "gate_up_proj" else {kind: (0, 1)}
            for part, (first, step) in parts.items():
                for i, expert in enumerate(tensor):
                    end = "bias" if leaf.endswith("_bias") else "weight"
                    named[f"{module}.{i}.{part}.{end}"] = expert[..., first::step].T
            continue
        if leaf not in ("gate_up_proj", "down_proj"):
            named[name] = tensor
            continue
        kinds = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for i, expert in enumerate(tensor):
            for kind, part in zip(kinds, np.split(expert, len(kinds)), strict=True):
                named[f"{module}.{i}.{kind}.weight"] = part
    return named


def torch_logits(model, tokens):
    """[B, T] -> [B, T, V], a torch tensor."""
    ids = torch.as_tensor(np.asarray(tokens), dtype=torch.long)
    return model(input_ids=ids, use_cache=False).logits


def assert_decodes_as_transformers(folder, params, config):
    """200 greedy tokens are those of transformers, which reads the model from its folder."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    prompt = [5, 99, 17, 42]
    config = config.replace(max_positions=512)
    settings = {"group_size": 1, "max_new_tokens": 200, "temperature": 0.0}
    ours = generate(params, config, [prompt], key=jax.random.key(0), **settings)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(200):
            last = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    np.testing.assert_array_equal(ours.tokens.reshape(-1), ids[0, len(prompt) :].numpy())
