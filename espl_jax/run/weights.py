"""The initial weights of a run, and the weights that it trains."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import jax
import jax.numpy as jnp

from espl_jax.models import lora
from espl_jax.models.config import NUMERICS, DecoderConfig
from espl_jax.models.params import abstract
from espl_jax.parallel import processes, sharding
from espl_jax.pretrained.load import Pretrained, load_pretrained, read_config
from espl_jax.pretrained.numerics import AUTO, CHOSEN, resolve
from espl_jax.run.check_groups import trains
from espl_jax.run.config import Config
from espl_jax.storage import folders


def settle_numerics(config: Config, workdir: str | os.PathLike[str] | None = None) -> Config:
    """Returns the configuration with every "auto" of its numerics resolved.

    Args:
      config: the run's configuration.
      workdir: the work directory; a resumed run keeps the values recorded in its config.json.
    """
    settled = config.copy_and_resolve_references()
    recorded = _recorded_numerics(workdir) if workdir is not None else {}
    given = {name: config.model[name] for name in CHOSEN}
    given |= {name: value for name, value in recorded.items() if given.get(name) == AUTO}
    mesh = sharding.make_mesh(dict(config.mesh))
    chosen = resolve(
        given, lambda: read_config(config.model.source), devices=1 if mesh is None else mesh.size
    )
    for name, value in processes.decide(lambda: chosen).items():
        settled.model[name] = value
    return settled


def _recorded_numerics(workdir: str | os.PathLike[str]) -> dict[str, str]:
    try:
        model = json.loads(folders.open_folder(workdir).read("config.json") or "{}").get("model", {})
    except ValueError:  # truncated file; opening the work directory reports it
        return {}
    return {name: model[name] for name in CHOSEN if name in model}


def numerics(config: Config) -> dict[str, Any]:
    """Returns the DecoderConfig fields that the run sets."""
    # A run of an earlier version has no such field.
    cache_dtype = config.sampling.get("cache_dtype", "same")
    others = {"lora_scale": config.lora.scale, "cache_dtype": cache_dtype}
    return {name: config.model[name] for name in NUMERICS} | others


def load_reference(config: Config, mesh: jax.sharding.Mesh | None, **changes: Any) -> Pretrained:
    """Loads the model that a run starts from; DecoderConfig fields in `changes` override those of the run.

    If the run trains weights, an adapter of the loaded model is merged into its base, since the run adds
    its own adapters.
    """
    model = load_pretrained(config.model.source, mesh=mesh, **numerics(config) | changes)
    _, adapters = lora.detach(model.params)
    if not adapters or not trains(config):
        return model
    merged = jax.jit(lora.merge, static_argnames="decoder")(model.params, model.config)
    return dataclasses.replace(
        model, params=merged, config=model.config.replace(lora_scale=config.lora.scale)
    )


def load_reflector(config: Config, mesh: jax.sharding.Mesh | None) -> Pretrained | None:
    """The model of `reflection.source`, with the numerics of the policy; None where the policy or the
    reference reflects."""
    if not config.reflection.source or config.mode == "rl":
        return None
    return load_pretrained(config.reflection.source, mesh=mesh, **numerics(config))


def declared_trainable(config: Config, decoder: DecoderConfig) -> Any:
    """Returns declarations of the trained weights: adapters, or all weights, in float, if the rank is 0."""
    if config.lora.rank:
        return lora.abstract_adapters(decoder, config.lora.rank, tuple(config.lora.targets))
    return abstract(decoder.replace(param_dtype=decoder.float_dtype))


def abstract_trainable(config: Config, decoder: DecoderConfig, mesh: jax.sharding.Mesh | None) -> Any:
    """Returns the abstract trained weights: adapters, or all weights if the rank is 0; float32, sharded."""
    declared = declared_trainable(config, decoder)
    shapes = jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.shape, jnp.float32), declared)
    return sharding.place(shapes, declared, mesh)
