"""Times google-tunix's own JAX sampler with its own Llama; see measure.py.

Prompts go in as token lists, through a tokenizer that leaves them alone. They are padded to the longest one
instead of the next power of two, and top-p 1 lets the sampler skip its sorting of the vocabulary.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax.numpy as jnp
from measure import read_request, report
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors


class TokenLists:
    """A tokenizer for prompts that are token lists already."""

    def encode(self, tokens: list[int]) -> list[int]:
        """The tokens as they are."""
        return list(tokens)

    def decode(self, tokens: list[int]) -> str:
        """No text is asked for."""
        return ""

    def bos_id(self) -> None:
        """None: nothing is put before a prompt."""

    def eos_id(self) -> int:
        """No token ends a sequence."""
        return -1

    def pad_id(self) -> int:
        """A token that no prompt holds: padding is told from prompts by it."""
        return 0


request = read_request()
described = json.loads((Path(request.model) / "config.json").read_text(encoding="utf-8"))
theta = described.get("rope_theta") or described["rope_parameters"]["rope_theta"]
# Release 0.1.7 leaves the config's RoPE base unused here.
llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=theta)
config = llama.ModelConfig(
    num_layers=described["num_hidden_layers"],
    vocab_size=described["vocab_size"],
    embed_dim=described["hidden_size"],
    hidden_dim=described["intermediate_size"],
    num_heads=described["num_attention_heads"],
    head_dim=described["head_dim"],
    num_kv_heads=described["num_key_value_heads"],
    rope_theta=theta,
    norm_eps=described["rms_norm_eps"],
    weight_tying=described["tie_word_embeddings"],
)
model = create_model_from_safe_tensors(request.model, config, dtype=getattr(jnp, request.settings["dtype"]))
width = max(map(len, request.flat))
sampler = Sampler(
    model,
    TokenLists(),
    CacheConfig(
        cache_size=width + request.max_new_tokens,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    ),
)


def sample(seed: int) -> int:
    """One call of the workload."""
    out = sampler(
        request.rows,
        max_generation_steps=request.max_new_tokens,
        max_prompt_length=width,
        temperature=1.0,
        top_p=1.0,
        seed=seed,
    )
    return sum(map(len, out.tokens))


def greedy(prompts: list[list[int]], count: int) -> list[list[int]]:
    """The most likely continuation of each prompt."""
    out = sampler(prompts, max_generation_steps=count, max_prompt_length=width)
    return [tokens.tolist() for tokens in out.tokens]


report(request, sample, greedy, ("google-tunix", "jax", "flax"))
