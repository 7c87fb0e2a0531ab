"""Reads a run from its work directory without locking or changing it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from typing import Any, cast

import jax
from absl import logging

from espl_jax.evolution.deployment import deployed
from espl_jax.evolution.population import Population, from_json, prompt_from_json
from espl_jax.models import lora
from espl_jax.models.config import NUMERICS
from espl_jax.models.params import Params, to_storage
from espl_jax.pretrained.load import Pretrained
from espl_jax.run import inputs
from espl_jax.run.check_groups import trains
from espl_jax.run.config import Config
from espl_jax.run.weights import abstract_trainable, load_reference
from espl_jax.storage import folders
from espl_jax.storage.workdir import read_checkpoint
from espl_jax.training.state import TrainState
from espl_jax.types import SystemPrompt

_READ = {
    "mode": (),
    "model": ("source", *NUMERICS, "chat_template_kwargs"),
    "lora": ("rank", "scale", "targets"),
    "environment": ("show_thinking",),
    "deployment": ("rule", "min_tournaments"),
}
"""Configuration fields that reading a run requires: top-level fields, and groups with their fields."""


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """The newest checkpoint of a run, with its model.

    Attributes:
      path: the work directory, local or in a bucket.
      config: the run's configuration.
      iteration: iterations done at the checkpoint.
      model: the policy: trained weights, or the base model with adapters attached. If the mode trains no
        weights, the model that the run started from.
      adapters: adapters of the policy, or None.
      root: the oldest of the initial prompts.
      population: the prompts with their ratings.
    """

    path: folders.AnyPath
    config: Config
    iteration: int
    model: Pretrained
    adapters: Params | None
    root: SystemPrompt
    population: Population

    def prompt(self, name: str = "deployed") -> SystemPrompt:
        """Returns the prompt to deploy (`deployed`), the `root`, or the living member with that id.

        Raises:
          ValueError: if there is no such member.
        """
        if name == "deployed":
            return self._deployed()
        if name in ("root", self.root.id):
            return self.root
        ids = [member.id for member in self.population.members]
        if name not in ids:
            raise ValueError(
                f"prompt={name!r}: no such prompt; give deployed, root, or one of {', '.join(ids)}"
            )
        return self.population.get(name)

    def _deployed(self) -> SystemPrompt:
        """Returns the prompt in results.json if the run has ended; before that, the choice by ratings."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            results = json.loads((self.path / "results.json").read_text(encoding="utf-8"))
            if results["iteration"] == self.iteration:
                return self.population.get(results["deployed"]["id"])
        return deployed(self.population, self.config.mode, self.config.deployment).prompt


def is_run(path: str | os.PathLike[str]) -> bool:
    """Returns whether `path` is a work directory: its config.json is that of a run, not of a model."""
    # A local OSError, e.g. a name that is too long, means no. An unreadable bucket is an error.
    with contextlib.suppress(*([] if folders.is_remote(path) else [OSError]), ValueError):
        config = json.loads(folders.open_folder(path).read("config.json") or b"")
        return isinstance(config, dict) and {"mode", "num_iterations"} <= config.keys()
    return False


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """Returns the configuration of a run.

    Raises:
      FileNotFoundError: if there is no run.
      ValueError: if it lacks fields that `read_run` needs.
    """
    folder = folders.open_folder(workdir)
    path, text = folder.path / "config.json", folder.read("config.json")
    if text is None:
        raise FileNotFoundError(f"{folder.path} has no config.json; give the --workdir of a run")
    config = json.loads(text)
    missing = [group for group in _READ if group not in config]
    missing += [
        f"{group}.{name}"
        for group, names in _READ.items()
        for name in names
        if name not in config.get(group, names)
    ]
    if missing:
        raise ValueError(_other_version(path, f"it has no {', '.join(missing)}"))
    return Config(config)


def check_run(workdir: str | os.PathLike[str]) -> Config:
    """Returns the configuration of a run that has a checkpoint. Raises like `read_run`; reads no weights."""
    config = read_config(workdir)
    _newest(folders.parse(workdir), None)
    return config


def read_run(
    workdir: str | os.PathLike[str], mesh: jax.sharding.Mesh | None = None, **numerics: Any
) -> SavedRun:
    """Reads the newest checkpoint of a run, which may still be running.

    Writes and locks nothing, needs no problems, and does not read the optimizer state.

    Args:
      workdir: the work directory.
      mesh: mesh for the params, independent of the run's mesh; None for the default device.
      **numerics: DecoderConfig fields that override those of the run.

    Raises:
      FileNotFoundError: if there is no run, or it has no checkpoint yet.
      ValueError: if the checkpoint is damaged, does not fit the model, or was written by another version of
        the package. Otherwise as `load_pretrained`.
    """
    path = folders.parse(workdir)
    config = read_config(path)
    model = load_reference(config, mesh, **numerics)
    trainable = abstract_trainable(config, model.config, mesh) if trains(config) else None
    # What is None is not read.
    wanted = TrainState(cast(jax.Array, None), cast(Params, trainable), opt_state=None)
    iteration, train_state, state = _newest(path, wanted)
    read = {"model.source": inputs.fingerprint_files(model.files)}
    for field, names in inputs.changes(state["inputs"], read).items():
        logging.warning(
            "%s=%r: %s changed since the run in %s; its checkpoint may not fit this model",
            field,
            config.model.source,
            ", ".join(names),
            path,
        )
    adapters = train_state.trainable if trains(config) and config.lora.rank else None
    if adapters is not None:
        model = dataclasses.replace(model, params=lora.attach(model.params, adapters))
    elif trains(config):
        params = train_state.trainable
        if model.config.param_dtype == "int8":  # asked for by `numerics`
            params = jax.jit(to_storage, static_argnames="decoder")(params, model.config)
        model = dataclasses.replace(model, params=params)
    try:
        root, population = prompt_from_json(state["root"]), from_json(state["population"])
    except (KeyError, ValueError) as error:
        raise ValueError(_other_version(path, str(error))) from error
    return SavedRun(path, config, iteration, model, adapters, root, population)


def _other_version(path: folders.AnyPath, what: str) -> str:
    return (
        f"{path} was written by another version of espl_jax ({what}); evaluate or export it with that version"
    )


def _newest(path: folders.AnyPath, abstract_arrays: Any) -> tuple[int, Any, dict[str, Any]]:
    saved = read_checkpoint(path, abstract_arrays)
    if saved is None:
        raise FileNotFoundError(f"{path} has no checkpoint yet; try again after the first iteration")
    return saved
