"""A run as its work directory holds it, read without disturbing it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from espl_jax.assemble import abstract_trainable, load_reference, trains
from espl_jax.evolution.population import Population, from_json, prompt_from_json
from espl_jax.evolution.selection import deployed
from espl_jax.models import lora
from espl_jax.models.transformer import Params
from espl_jax.pretrained import Pretrained
from espl_jax.run_state import read_checkpoint
from espl_jax.train_step import TrainState
from espl_jax.types import SystemPrompt


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """The newest checkpoint of a run, with the model that its weights belong to.

    Attributes:
      path: the work directory.
      config: of the run.
      iteration: iterations done at the checkpoint.
      model: the policy: trained weights, or the base with adapters attached, or, where the mode changes
        prompts alone, the model that the run began with.
      adapters: of the policy; None where there are none.
      root: the oldest of the first prompts.
      population: the prompts with their ratings.
    """

    path: Path
    config: ConfigDict
    iteration: int
    model: Pretrained
    adapters: Params | None
    root: SystemPrompt
    population: Population

    def prompt(self, name: str = "deployed") -> SystemPrompt:
        """The prompt to deploy (`deployed`), the `root`, or the living member with that id.

        Raises:
          ValueError: if there is no such member.
        """
        if name == "deployed":
            return deployed(self.population, self.config.mode)
        if name in ("root", self.root.id):
            return self.root
        ids = [member.id for member in self.population.members]
        if name not in ids:
            raise ValueError(f"prompt={name!r}: give deployed, root, or one of {', '.join(ids)}")
        return self.population.get(name)


def read_run(
    workdir: str | os.PathLike[str], mesh: jax.sharding.Mesh | None = None, **numerics: Any
) -> SavedRun:
    """Reads a run's newest checkpoint, while the run may be going on.

    Nothing is written or locked, no problems are needed, and the optimizer's state is not read.

    Args:
      workdir: of the run.
      mesh: devices that share the params, whatever mesh the run has; the default device when None.
      **numerics: DecoderConfig fields that go before those of the run.

    Raises:
      FileNotFoundError: if there is no run, or no checkpoint of it yet.
      ValueError: if the checkpoint is damaged, or does not fit the model. Else as `load_pretrained`.
    """
    path = Path(workdir).expanduser()
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json: give the --workdir of a run")
    config = ConfigDict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    model = load_reference(config, mesh, **numerics)
    trainable = abstract_trainable(config, model.config, mesh) if trains(config) else None
    saved = read_checkpoint(path, TrainState(step=None, trainable=trainable, opt_state=None))
    if saved is None:
        raise FileNotFoundError(f"{path} has no checkpoint yet: try again after its first iteration")
    iteration, train_state, state = saved
    adapters = train_state.trainable if trains(config) and config.lora.rank else None
    if adapters is not None:
        model = dataclasses.replace(model, params=lora.attach(model.params, adapters))
    elif trains(config):
        model = dataclasses.replace(model, params=train_state.trainable)
    root, population = prompt_from_json(state["root"]), from_json(state["population"])
    return SavedRun(path, config, iteration, model, adapters, root, population)
