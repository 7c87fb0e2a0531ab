"""Models small enough to write to a GGUF file in a test."""

import math

import gguf
import numpy as np

V, L, D, N, K, H, F = 40, 2, 32, 4, 2, 8, 64

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
"""What GGUF calls a model_type, where it is not the same."""


def tiny_tensors(rng, tied=False):
    """Random weights under their GGUF names, shaped [out, in]."""
    shapes = {"token_embd": (V, D), "output_norm": (D,)} | ({} if tied else {"output": (V, D)})
    for i in range(L):
        shapes |= {
            f"blk.{i}.attn_q": (N * H, D),
            f"blk.{i}.attn_k": (K * H, D),
            f"blk.{i}.attn_v": (K * H, D),
            f"blk.{i}.attn_output": (D, N * H),
            f"blk.{i}.ffn_gate": (F, D),
            f"blk.{i}.ffn_up": (F, D),
            f"blk.{i}.ffn_down": (D, F),
            f"blk.{i}.attn_norm": (D,),
            f"blk.{i}.ffn_norm": (D,),
        }
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_field(writer, key, value):
    """Adds a field of the type that converters give such a value."""
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def write_as_llama_cpp(path, model, **fields):
    """Writes a torch model of transformers as llama.cpp's converter does; extra fields as they are.

    Its names come from the table of the gguf package.
    """
    c = model.config
    architecture = ARCHITECTURES.get(c.model_type, c.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    fields = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
    } | fields
    if rope["rope_type"] in ("linear", "yarn"):
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    for name, value in fields.items():
        write_field(writer, f"{architecture}.{name}", value)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, head_dim))

    (kind,) = (kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, c.num_hidden_layers)
    for name, tensor in model.named_parameters():
        values = tensor.detach().numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            halves = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_divisors(rope, head_dim, original=8192):
    """What Llama 3's scaling divides each frequency by, in terms of wavelengths."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        if wavelength < original / rope["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)
