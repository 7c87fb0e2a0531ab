"""Saves params in the format of transformers, which servers also read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerBase

from espl_jax.models import lora
from espl_jax.models.config import DecoderConfig, dtype_name
from espl_jax.models.params import Params, Weight, abstract
from espl_jax.pretrained import fused_experts
from espl_jax.pretrained.hf_config import to_hf_config
from espl_jax.pretrained.hf_names import by_path, names, scale_path
from espl_jax.pretrained.layout import file_shape, to_file
from espl_jax.pretrained.new_folder import new_folder
from espl_jax.pretrained.peft import declare_like
from espl_jax.pretrained.shards import DTYPES, Tensor, write_shards
from espl_jax.pretrained.text_files import write_text_files
from espl_jax.types import SystemPrompt


def save_pretrained(
    folder: str | os.PathLike[str],
    params: Params,
    config: DecoderConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    system_prompt: SystemPrompt | str | None = None,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: float = 5e9,
    generation: dict[str, Any] | None = None,
    model_card: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model as a folder in Hugging Face's format, with adapters merged into the weights.

    Weights are merged in float32 and written one tensor of one layer at a time, and rounded once. Those in
    int8, and those of gpt-oss, are written unquantized.

    Args:
      folder: output folder, written atomically; must be new or empty.
      params: params, with or without adapters; all leaves must be addressable by this process.
      config: the decoder, with the `lora_scale` of the adapters.
      tokenizer: also saved; None saves no tokenizer.
      system_prompt: becomes the default system message of the chat template, and `system_prompt.txt`.
      dtype: dtype of the saved weights, float32 or bfloat16, as a name or a jax or numpy dtype; by default
        `config.param_dtype`, or bfloat16 if that is int8.
      max_shard_bytes: maximum bytes of weights per file.
      generation: fields of generation_config.json besides the special token ids.
      model_card: contents of README.md.
      template_arguments: defaults of the chat template's arguments (`enable_thinking`, ...).

    Raises:
      FileExistsError: if the folder is not empty.
      ValueError: if the params do not match the config, the config does not match its family, the dtype is
        unknown, or there is a system prompt but no chat template.
      OSError: if the disk is full.
    """
    held = "bfloat16" if config.param_dtype == "int8" else config.param_dtype
    stored: str = held if dtype is None else dtype_name(dtype)
    if stored not in DTYPES:
        raise ValueError(f"dtype={stored!r}: choose one of {', '.join(DTYPES)}")
    ids, padding = {}, {}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        padding = {"pad_token_id": pad}
    # Older readers use torch_dtype.
    described = {**to_hf_config(config), **ids, "dtype": stored, "torch_dtype": stored}
    generating = {**ids, **padding, **(generation or {})}
    tensors = _tensors(params, config)
    if config.family == "gpt_oss":
        tensors = fused_experts.join(tensors, stored)
    with new_folder(folder) as unfinished:
        for name, fields in {"config": described, "generation_config": generating}.items():
            (unfinished / f"{name}.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        write_text_files(unfinished, tokenizer, system_prompt, model_card, template_arguments)
        write_shards(unfinished, tensors, stored, max_shard_bytes)


def _tensors(params: Params, config: DecoderConfig) -> list[Tensor]:
    """Returns every tensor of the checkpoint, layer by layer; each is read from the params when written."""
    base, adapters = lora.detach(params)
    declared, leaves = by_path(abstract(config)), by_path(base)
    for path in sorted(declared.keys() | leaves.keys()):
        ours = list(leaves[path].shape) if path in leaves else "(absent)"
        wanted = list(declared[path].shape) if path in declared else "(absent)"
        if ours != wanted:
            raise ValueError(f"params: {path} is {ours}, but the decoder's config requires {wanted}")
    if adapters:
        declared |= declare_like(adapters, config)
        leaves |= by_path(adapters)

    tensors: dict[int, list[Tensor]] = {layer: [] for layer in range(-1, config.num_layers)}
    for path, name in names(config).items():
        weight = declared[path]
        for index, numbers in zip(np.ndindex(*weight.stack_shape), weight.members, strict=True):
            read = _reader(path, index, leaves, declared, config.lora_scale)
            layer = numbers[0] if numbers else -1
            exact = "float32" if path.rpartition("/")[2] == "correction" else ""  # see `params`
            tensors[layer].append(Tensor(name.format(*numbers), file_shape(weight), read, exact))
    return [tensor for layer in tensors.values() for tensor in layer]


def _reader(
    path: str, index: tuple[int, ...], leaves: dict[str, Any], declared: dict[str, Weight], scale: float
) -> Callable[[], np.ndarray]:
    """Returns a reader of one tensor in a weight's stack, in file layout, adapter included."""

    def in_file(path: str) -> np.ndarray:
        return to_file(declared[path], np.asarray(leaves[path][index]).astype(np.float32))

    def read() -> np.ndarray:
        weight = in_file(path)
        module, _, leaf = path.rpartition("/")
        if leaf == "weight" and scale_path(path) in leaves:
            weight *= in_file(scale_path(path))[:, None]
        if leaf == "weight" and f"{module}/lora_a" in leaves:
            weight = weight + np.float32(scale) * (in_file(f"{module}/lora_b") @ in_file(f"{module}/lora_a"))
        return weight

    return read
