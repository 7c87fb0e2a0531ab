"""The same decoder and loss in transformers and torch, as an independent reference."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support import ragged_tree

_PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def build(config):
    """A transformers model of the same architecture with random weights."""
    hf = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_head,
        max_position_embeddings=config.max_positions,
    )
    return LlamaForCausalLM(hf).float().eval()


def from_params(params, config):
    """A transformers model with our weights."""
    model = build(config)
    state = {name: torch.tensor(x) for name, x in to_names(params, config).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


def to_names(params, config):
    """Params, or their gradients, under transformers' names and in its layouts."""
    stacked = params["layers"]
    named = {
        "model.embed_tokens.weight": params["embedding"]["weight"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    if not config.tied_head:
        named["lm_head.weight"] = params["head"]["weight"]
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        for ours, theirs in _PROJECTIONS.items():
            weight = np.asarray(
                stacked["attention" if ours in stacked["attention"] else "mlp"][ours]["weight"][i]
            )
            inputs = 2 if ours == "out" else 1
            named[f"{prefix}{theirs}.weight"] = weight.reshape(np.prod(weight.shape[:inputs]), -1).T
        named[prefix + "input_layernorm.weight"] = stacked["attention_norm"]["scale"][i]
        named[prefix + "post_attention_layernorm.weight"] = stacked["mlp_norm"]["scale"][i]
    return {name: np.array(x, np.float32) for name, x in named.items()}


def logits(model, tokens, weights=None):
    """[B, T] -> [B, T, V]; `weights` stand in for the model's own of the same names."""
    ids = torch.as_tensor(np.asarray(tokens), dtype=torch.long)
    return torch.func.functional_call(model, weights or {}, (ids,), {"use_cache": False}).logits


def policy_loss(model, batch, temperature, kl_coef=0.0, weights=None, reference=None):
    """The loss of a tree, computed on plain sequences over the whole vocabulary."""
    flat = ragged_tree.flatten(batch)

    def shaped(x, dtype=torch.float32):
        return torch.as_tensor(np.asarray(x).reshape(len(flat.starts), -1), dtype=dtype)

    rows = torch.arange(len(flat.starts))[:, None]
    columns = torch.as_tensor(flat.starts)[:, None] + torch.arange(batch.inputs.shape[-1])
    mask = shaped(batch.mask, torch.bool)
    rows, columns = rows.expand_as(columns)[mask], columns[mask]

    def distributions(model, weights=None):
        return torch.log_softmax(logits(model, flat.tokens, weights)[rows, columns] / temperature, -1)

    own = distributions(model, weights)
    chosen = own.gather(-1, shaped(batch.targets, torch.long)[mask][:, None])[:, 0]
    ratio = torch.exp(chosen - shaped(batch.sampler_logprobs)[mask])
    loss = -(ratio * shaped(batch.advantages).expand_as(mask)[mask]).sum()
    if kl_coef:
        with torch.no_grad():
            other = distributions(reference)
        loss = loss + kl_coef * (own.exp() * (own - other)).sum()
    return loss / float(batch.num_rollouts)


def full_gradients(model, batch, **loss):
    """(loss, gradients by name) of full fine-tuning."""
    model.zero_grad()
    value = policy_loss(model, batch, **loss)
    value.backward()
    return value.item(), {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def lora_gradients(model, adapters, scale, batch, **loss):
    """(loss, gradients shaped like `adapters`), with W + scale * A B in place of every adapted weight."""
    leaves = {}
    weights = {}
    state = dict(model.named_parameters())
    for group in adapters["layers"].values():
        for ours, pair in group.items():
            a, b = (torch.tensor(np.asarray(pair[k]), requires_grad=True) for k in ("lora_a", "lora_b"))
            leaves[ours] = a, b
            for i in range(len(a)):
                update = a[i].reshape(-1, a.shape[-1]) @ b[i].reshape(b.shape[1], -1)
                name = f"model.layers.{i}.{_PROJECTIONS[ours]}.weight"
                weights[name] = state[name].detach() + scale * update.T
    value = policy_loss(model, batch, weights=weights, **loss)
    value.backward()
    grads = {
        "layers": {
            name: {
                ours: {"lora_a": leaves[ours][0].grad.numpy(), "lora_b": leaves[ours][1].grad.numpy()}
                for ours in group
            }
            for name, group in adapters["layers"].items()
        }
    }
    return value.item(), grads
