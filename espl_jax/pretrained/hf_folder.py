"""Reads folders in the format of transformers' save_pretrained: `config.json`, safetensors, tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import Params, abstract
from espl_jax.pretrained import fp8, fused_experts, hf_names
from espl_jax.pretrained.fused_experts import in_files
from espl_jax.pretrained.hf_config import from_hf_config
from espl_jax.pretrained.layout import file_shape
from espl_jax.pretrained.safetensors_files import DTYPES, Stored, open_checkpoint
from espl_jax.pretrained.stream import load_int8, load_weight
from espl_jax.storage import json_values

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BLOCK = 4096  # rows compared at once

_Tensor = TypeVar("_Tensor", bound=Stored)

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with a tokenizer has at least one of these files."""


def read_config(folder: Path, **numerics: Any) -> DecoderConfig:
    """Returns the DecoderConfig for a folder, from its `config.json` and weights.

    Args:
      folder: folder of the model.
      **numerics: DecoderConfig fields that are not in the file.

    Raises:
      As `described`.
    """
    config = described(folder, **numerics)
    return config.replace(tied_head=config.tied_head and not _has_another_head(folder, config))


def described(folder: Path, **numerics: Any) -> DecoderConfig:
    """Returns the DecoderConfig from `config.json` only; the weights may have a head that it lacks.

    Args:
      folder: folder of the model.
      **numerics: DecoderConfig fields that are not in the file.

    Raises:
      FileNotFoundError: if there is no config.json.
      ValueError: if it is damaged, or of an unsupported architecture or quantization.
    """
    fields = read_json(folder / "config.json")
    try:
        fp8.block_of(fields)
        return from_hf_config(fields, **numerics)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def read_params(folder: Path, config: DecoderConfig, mesh: Mesh | None) -> Params:
    """Loads the folder's weights onto their devices, in the config's `param_dtype`, streamed by shard.

    Weights are rounded to int8 on the way in.

    Raises:
      FileNotFoundError: if files are missing.
      ValueError: if a file is truncated or damaged, or its tensors do not match the config.
    """
    stored = decoder_tensors(folder, config)
    tree = abstract(config)
    declared, loaded = hf_names.by_path(tree), {}
    for path, tensors in stored.items():
        weight = declared[path]
        if weight.dtype == "int8":
            loaded[path], loaded[hf_names.scale_path(path)] = load_int8(weight, tensors, mesh)
        else:
            loaded[path] = load_weight(weight, tensors, mesh)
    return jax.tree.unflatten(jax.tree.structure(tree), [loaded[path] for path in declared])


def decoder_tensors(folder: Path, config: DecoderConfig) -> dict[str, list[Stored]]:
    """Returns the tensors of each weight, by its path in the params, in the order of `hf_names.stacked`.

    Checks, before reading any data, that all tensors exist with the right shape and a supported dtype, and
    that there are no other tensors that could change what the model computes.

    Raises:
      FileNotFoundError: if files are missing.
      ValueError: with the tensors that are missing, unexpected, or of another shape or dtype.
    """
    opened = open_checkpoint(folder)
    tensors: Mapping[str, Stored] = (
        fused_experts.split(_known_names(opened, config))
        if config.family == "gpt_oss"
        else _known_names(fp8.scaled(opened, folder), config)
    )
    names = hf_names.names(config)
    declared = hf_names.by_path(abstract(config))
    wanted = {path: hf_names.stacked(name, declared[path]) for path, name in names.items()}
    every = {name for group in wanted.values() for name in group}
    if missing := sorted({in_files(name) for name in every - set(tensors)}):
        raise ValueError(
            f"{folder}: {_listed(missing)} missing; config.json may belong to another model, or the download "
            "is incomplete: download the model again"
        )
    if unexpected := sorted({in_files(name) for name in set(tensors) - every}):
        raise ValueError(
            f"{folder}: {_listed(unexpected)} not part of a {config.family} decoder, so the model has an "
            "unsupported feature; use another model"
        )
    for path, group in wanted.items():
        shape = file_shape(declared[path])
        for name in group:
            stored = tensors[name]
            if stored.shape != shape:
                raise ValueError(
                    f"{stored.path}: {name} has shape {list(stored.shape)}, but config.json requires "
                    f"{list(shape)}; use files of the same model"
                )
            if stored.dtype not in DTYPES:
                raise ValueError(
                    f"{stored.path}: {name} is stored as {stored.dtype}, and only {', '.join(DTYPES)} are "
                    "supported; use the unquantized model"
                )
    return {path: [tensors[name] for name in group] for path, group in wanted.items()}


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder has a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def read_tokenizer(folder: Path, family: str = "") -> PreTrainedTokenizerBase:
    """Loads the folder's tokenizer, with its chat template if there is one. Runs no code from the folder.

    Args:
      folder: folder of a model or an adapter.
      family: family of the decoder.

    Raises:
      FileNotFoundError: if the folder has no tokenizer.
      ValueError: if transformers cannot read it.
    """
    if not has_tokenizer(folder):
        raise FileNotFoundError(
            f"{folder} has no tokenizer (none of {', '.join(VOCABULARIES)}); copy the tokenizer of its "
            "base model"
        )
    try:
        if (folder / "tokenizer.json").is_file():
            # The file is complete; AutoTokenizer would build its own tokenizer for the family. (Except for
            # Mistral: transformers fixes tokenizers that were published with a wrong pattern.)
            fixed: dict[str, Any] = {"fix_mistral_regex": True} if family == "mistral" else {}
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, **fixed)
            # Multimodal models keep their template here; in transformers only processors read it.
            separate = folder / "chat_template.json"
            if tokenizer.chat_template is None and separate.is_file():
                tokenizer.chat_template = read_json(separate).get("chat_template")
            return tokenizer
        from transformers import AutoTokenizer  # imports torch if installed, which takes seconds

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # for damaged files, the readers raise all kinds of exceptions
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {said}); it is damaged, or "
            "needs custom code, which is never run; save it again with a tokenizer.json"
        ) from error


def read_generation(folder: Path) -> dict[str, Any]:
    """Returns `generation_config.json` of the folder, with special token ids that only `config.json` has.

    Raises:
      FileNotFoundError, ValueError: if the files are missing or damaged.
    """
    path = folder / "generation_config.json"
    own = read_json(path) if path.is_file() else {}
    fields = read_json(folder / "config.json")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: fields[name] for name in ids if fields.get(name) is not None} | own


def _known_names(tensors: Mapping[str, _Tensor], config: DecoderConfig) -> dict[str, _Tensor]:
    """Renames tensors to the names of a text-only decoder, and drops tensors that are not weights of it."""
    known = {}
    # Layers after the last, which predict further tokens (multi-token prediction).
    further = tuple(
        name.removesuffix("eh_proj.weight")
        for name in tensors
        if (at := re.fullmatch(r"model\.layers\.(\d+)\.eh_proj\.weight", name))
        and int(at[1]) >= config.num_layers
    )
    for name, tensor in tensors.items():
        # A constant, saved by older versions.
        if name.endswith(".rotary_emb.inv_freq") or name.startswith(further):
            continue
        if config.family == "gemma3":
            # Multimodal models have the same decoder under a longer name.
            if re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name):
                continue
            name = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name)
            name = name.removeprefix("language_model.")
        known[name] = tensor
    if config.tied_head and (head := known.pop(_HEAD, None)):
        known.setdefault(_EMBEDDING, head)  # either of the two copies may be missing
    return known


def _has_another_head(folder: Path, config: DecoderConfig) -> bool:
    """Returns whether the files have a head that differs from the embedding although the config ties them.

    The files take precedence, as in transformers.
    """
    tensors = _known_names(open_checkpoint(folder), config.replace(tied_head=False))
    head, embedding = tensors.get(_HEAD), tensors.get(_EMBEDDING)
    if head is None or embedding is None or head.shape != embedding.shape:
        return False
    if {head.dtype, embedding.dtype} - DTYPES.keys():
        return True  # not compared: `decoder_tensors` dequantizes both, or refuses them
    one, other = head.view(), embedding.view()
    return any(
        not np.array_equal(one[row : row + _BLOCK], other[row : row + _BLOCK])
        for row in range(0, len(one), _BLOCK)
    )


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}) are"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises FileNotFoundError or ValueError with the path of the file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give a complete folder in the format of transformers' save_pretrained"
        )
    try:
        fields = json_values.parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a JSON object; download it again")
    return fields
