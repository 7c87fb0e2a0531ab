"""Saves and loads LoRA adapters in the format of Hugging Face's PEFT.

A folder has `adapter_config.json` and `adapter_model.safetensors`. PEFT scales by `lora_alpha / r`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from espl_jax.choices import LORA_TARGETS
from espl_jax.models import experts, lora
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import Params, Weight
from espl_jax.pretrained import fused_adapters
from espl_jax.pretrained.hf_folder import read_json
from espl_jax.pretrained.hf_names import by_path, module, stacked
from espl_jax.pretrained.hub import REPOSITORY
from espl_jax.pretrained.layout import file_shape, to_file
from espl_jax.pretrained.new_folder import new_folder
from espl_jax.pretrained.safetensors_files import DTYPES, Stored, read_header
from espl_jax.pretrained.shards import Tensor, write_file
from espl_jax.pretrained.stream import load_weight
from espl_jax.pretrained.text_files import write_text_files
from espl_jax.types import SystemPrompt

# PEFT settings that change the result, besides r and lora_alpha -> supported values.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    **dict.fromkeys(("use_dora", "use_qalora"), (False,)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save"), (None, {}, [])),
    **dict.fromkeys(("layers_to_transform", "layer_replication", "trainable_token_indices"), (None, [])),
    **dict.fromkeys(("lora_bias", "alora_invocation_tokens"), (None, False, [])),
    **dict.fromkeys(("kasa_config", "monteclora_config", "arrow_config", "use_bdlora"), (None, False, {})),
    # The other initializations (pissa, olora, corda, loftq, lora_ga, ...) subtract the initial adapter or a
    # quantization error from the base, so the adapter only fits that modified base.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}

# Those that are also supported where all experts are in one parameter, if they satisfy `fused_adapters.fits`.
_OF_PARAMETERS = ("rank_pattern", "alpha_pattern")

# PEFT settings that do not: names, training, and arguments of initializations.
_OF_NO_EFFECT = {
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *(
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_pattern",
        "ensure_weight_tying",
        "runtime_config",
    ),
    *("lora_dropout", "megatron_config", "megatron_core", "qalora_group_size", "velora_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}


def save_adapter(
    folder: str | os.PathLike[str],
    adapters: Params,
    config: DecoderConfig,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: SystemPrompt | str | None = None,
    *,
    base: str,
    model_card: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> None:
    """Writes float32 adapters as a folder that PEFT can load.

    Args:
      folder: output folder, written atomically; must be new or empty.
      adapters: subtree of the params, as returned by `lora.detach`.
      config: the decoder, with the `lora_scale` of the run.
      tokenizer: also saved, for its chat template.
      system_prompt: becomes the default system message of the template, and `system_prompt.txt`.
      base: the base model: a name on the Hub (optionally with `@revision`), or a folder.
      model_card: contents of README.md.
      template_arguments: defaults of the chat template's arguments (`enable_thinking`, ...).

    Raises:
      FileExistsError: if the folder is not empty.
      ValueError: if the adapters do not fit the decoder, PEFT has no format for them (experts with an adapter
        for only one of `gate` and `up`), or the tokenizer has no chat template for the prompt.
    """
    declared = declare_like(adapters, config)
    _check_experts(_targets(declared), config)
    leaves, tensors = by_path(adapters), []
    for path, weight in declared.items():
        for name, index in zip(_names(path, weight, config), np.ndindex(*weight.stack_shape), strict=True):
            read = functools.partial(_in_file, weight, leaves[path], index)
            tensors.append(Tensor(name, file_shape(weight), read))
    rank = _rank(adapters)
    alpha = config.lora_scale * rank
    named = REPOSITORY.fullmatch(base)
    modules = {module(path.rpartition("/")[0], config).rpartition(".")[2] for path in declared}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": named["repository"] if named else base,
        "revision": named["revision"] if named else None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        **_beside_experts(declared, config),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    if config.family == "gpt_oss":
        tensors = fused_adapters.join(tensors)
        settings |= _parameter_settings(sorted(modules), rank, settings["lora_alpha"])
    with new_folder(folder) as unfinished:
        text = json.dumps(settings, indent=2) + "\n"
        (unfinished / "adapter_config.json").write_text(text, encoding="utf-8")
        write_file(unfinished / "adapter_model.safetensors", tensors, "float32")
        write_text_files(unfinished, tokenizer, system_prompt, model_card, template_arguments)


def base_of(folder: str | os.PathLike[str]) -> str:
    """Returns the base model of an adapter: a name on the Hub, with the revision if given, or a path.

    Raises:
      ValueError: if the adapter does not name it.
    """
    path = Path(folder) / "adapter_config.json"
    settings = read_json(path)
    if not (base := settings.get("base_model_name_or_path")):
        raise ValueError(
            f"{path}: base_model_name_or_path is missing; set it to the base model of the adapter"
        )
    revision = settings.get("revision")
    return (
        f"{base}@{revision}" if revision and REPOSITORY.fullmatch(base) and not Path(base).exists() else base
    )


def load_adapter(
    folder: str | os.PathLike[str], config: DecoderConfig, mesh: Mesh | None = None
) -> tuple[Params, float]:
    """Loads adapters saved by PEFT or `save_adapter`.

    Args:
      folder: folder with adapter_config.json and adapter_model.safetensors.
      config: decoder of the base model.
      mesh: mesh over which the adapters are sharded; None for the default device.

    Returns:
      (adapters, lora_scale): float32 adapters for `lora.attach`, and the scale for `config.replace`.

    Raises:
      FileNotFoundError: if one of the two files is missing.
      ValueError: for an unsupported setting, or a tensor that is missing, unexpected or of another shape.
    """
    folder = Path(folder).expanduser()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; give a folder saved by PEFT")
    settings = read_settings(folder, config)
    known = {*_COMPUTED, *_OF_NO_EFFECT, "r", "lora_alpha", "use_rslora"}
    if unknown := {field: value for field, value in settings.items() if value and field not in known}:
        warnings.warn(  # as PEFT does
            f"{folder}/adapter_config.json: unknown settings {unknown} are ignored", stacklevel=2
        )
    scale = _scale(settings)(settings["lora_alpha"], settings["r"])
    return _read(folder / "adapter_model.safetensors", config, settings, mesh), scale


def read_settings(folder: Path, config: DecoderConfig | None = None) -> dict[str, Any]:
    """Reads adapter_config.json of a folder and checks that its settings are supported.

    Args:
      folder: folder of an adapter.
      config: decoder of the base model; None if it is not known yet, which skips checks that depend on it.

    Raises:
      FileNotFoundError: if it does not exist.
      ValueError: for an unsupported or missing setting.
    """
    path = folder / "adapter_config.json"
    settings = read_json(path)
    skipped = _OF_PARAMETERS if config is None or config.family == "gpt_oss" else ()
    for field, computed in _COMPUTED.items():
        if field not in skipped and (value := settings.get(field, computed[0])) not in computed:
            raise ValueError(
                f"{path}: {field}={value!r} is not supported; merge the adapter into its base with PEFT "
                "(merge_and_unload), save the model and load its folder"
            )
    _check_types(path, settings)
    fused = [each for each in settings.get("target_parameters") or () if not each.endswith(".weight")]
    if fused and not skipped:
        raise ValueError(
            f"{path}: target_parameters={fused!r}: only weights of linear layers are supported; merge the "
            "adapter into its base with PEFT (merge_and_unload), save the model and load its folder"
        )
    for field, least in (("r", 1), ("lora_alpha", 0)):
        value = settings.get(field)
        if not isinstance(value, int | float) or value < least:
            raise ValueError(
                f"{path}: {field}={value!r}: must be a number of at least {least}; set the value that the "
                "adapter was trained with"
            )
    if config is not None and skipped and not fused_adapters.fits(settings, _scale(settings)):
        raise ValueError(
            f"{path}: rank_pattern={settings.get('rank_pattern')}, alpha_pattern="
            f"{settings.get('alpha_pattern')}: only gate_up_proj may have another rank, and all adapters "
            "must have one scale; merge the adapter into its base with PEFT (merge_and_unload)"
        )
    return settings


def _check_types(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises for a setting of parameters whose value PEFT does not write."""
    names = settings.get("target_parameters") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: target_parameters={names!r}: must be a list of names; save it again")
    for field, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
        pattern = settings.get(field) or {}
        numbers = pattern.values() if isinstance(pattern, dict) else [None]
        if not all(isinstance(number, int | float) and number >= least for number in numbers):
            raise ValueError(
                f"{path}: {field}={pattern!r}: must give a number of at least {least} for each name; save it "
                "again"
            )


def _scale(settings: Mapping[str, Any]) -> Callable[[float, float], float]:
    """Returns the function that PEFT uses to compute an adapter's scale from its alpha and rank."""
    rank_stabilized = settings.get("use_rslora")
    return lambda alpha, rank: alpha / (math.sqrt(rank) if rank_stabilized else rank)


def _parameter_settings(modules: list[str], rank: int, alpha: float) -> dict[str, Any]:
    """Returns the settings that differ if experts, and the router, are parameters and not linear layers."""
    named = fused_adapters.PARAMETERS | {"router": "mlp.router.weight"}
    parameters = sorted({named[each] for each in modules if each in named})
    settings = {"target_modules": [each for each in modules if each not in named]}
    if parameters:
        settings["target_parameters"] = parameters
    return settings | (fused_adapters.patterns(rank, alpha) if "up_proj" in modules else {})


def declare_like(adapters: Params, config: DecoderConfig) -> dict[str, Weight]:
    """Returns declarations of adapters by path (`layers/mlp/up/lora_a`).

    Raises:
      ValueError: if they do not fit this decoder, with the first that differs.
    """
    leaves = by_path(adapters)
    declared = by_path(lora.abstract_adapters(config, _rank(adapters), _targets(leaves)))
    for path in sorted(leaves.keys() | declared.keys()):
        ours = list(leaves[path].shape) if path in leaves else "(absent)"
        wanted = list(declared[path].shape) if path in declared else "(absent)"
        if ours != wanted:
            raise ValueError(f"adapters: {path} is {ours}, but the decoder's config requires {wanted}")
    return declared


def _in_file(weight: Weight, leaf: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    return to_file(weight, np.asarray(leaf[index], np.float32))


def _check_experts(targets: tuple[str, ...], config: DecoderConfig) -> None:
    """PEFT loads adapters of experts by the names of Hub checkpoints, one per expert, and fuses `gate` and
    `up`."""
    if config.experts and ("gate" in targets) != ("up" in targets):
        raise ValueError(
            f"adapters: targets={targets}: PEFT cannot load experts with an adapter for only one of gate and "
            "up; train both, or save the merged model"
        )


def _beside_experts(declared: Mapping[str, Weight], config: DecoderConfig) -> dict[str, list[str]]:
    """Returns the setting that lets PEFT load adapters of dense layers and shared experts in a mixture.

    PEFT takes every `gate_proj`, `up_proj` and `down_proj` among the modules for one of the experts, which
    transformers fuses. These are therefore named as parameters too.
    """
    paths = {path.rpartition("/")[0] for path, weight in declared.items() if "experts" not in weight.stack}
    dense = [path for path in paths if config.experts and path.rpartition("/")[2] in experts.EXPERTS]
    names = sorted(".".join(module(path, config).split(".")[-2:]) + ".weight" for path in dense)
    return {"target_parameters": names} if names else {}


def _rank(adapters: Params) -> int:
    return next(leaf.shape[-1] for path, leaf in by_path(adapters).items() if path.endswith("lora_a"))


def _targets(paths: Iterable[str]) -> tuple[str, ...]:
    """Returns the names in `LORA_TARGETS` that occur in the paths of adapters."""
    parents = {path.split("/")[-2] for path in paths}
    return tuple(target for target in LORA_TARGETS if target in parents)


def _names(path: str, weight: Weight, config: DecoderConfig) -> list[str]:
    """Returns PEFT's names of the tensors that are stacked into one of our leaves."""
    parent, _, leaf = path.rpartition("/")
    part = {"lora_a": "lora_A", "lora_b": "lora_B"}[leaf]
    return stacked(f"base_model.model.{module(parent, config)}.{part}.weight", weight)


def _read(path: Path, config: DecoderConfig, settings: Mapping[str, Any], mesh: Mesh | None) -> Params:
    header, rank = read_header(path), settings["r"]
    every_tensor: Mapping[str, Stored] = header
    if config.family == "gpt_oss" and config.experts:
        parameters = settings.get("target_parameters") or ()
        every_tensor = fused_adapters.split(header, parameters, config.experts.count, rank)
    # For an adapted head, PEFT also saves the weight of the base.
    stored = {name: tensor for name, tensor in every_tensor.items() if ".base_layer." not in name}
    every = lora.targets_of(config)
    names = {
        leaf: _names(leaf, weight, config)
        for leaf, weight in by_path(lora.abstract_adapters(config, rank, every)).items()
    }
    targets = _targets([leaf for leaf in names if stored.keys() & names[leaf]])
    if not targets:
        raise ValueError(
            f"{path} has no adapter for this decoder, but {', '.join(sorted(stored)[:5])}; use its base"
        )
    tree = lora.abstract_adapters(config, rank, targets)
    declared = by_path(tree)
    wanted = {name: file_shape(weight) for leaf, weight in declared.items() for name in names[leaf]}
    for kind, odd in (
        ("missing", wanted.keys() - stored.keys()),
        ("not part of this decoder", stored.keys() - wanted.keys()),
        ("of another dtype than float32, float16 or bfloat16", _of_other_dtypes(stored)),
    ):
        if odd:
            raise ValueError(f"{path}: {len(odd)} tensors are {kind}, the first is {sorted(odd)[0]}")
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{path}: {name} is {list(stored[name].shape)}, but the decoder and r={rank} in "
                f"adapter_config.json require {list(shape)}"
            )
    leaves = [
        load_weight(weight, [stored[name] for name in names[leaf]], mesh) for leaf, weight in declared.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _of_other_dtypes(stored: Mapping[str, Stored]) -> set[str]:
    return {name for name, tensor in stored.items() if tensor.dtype not in DTYPES}
