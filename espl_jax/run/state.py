"""The state of a run between iterations: created, saved and restored."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from espl_jax.data.order import Cursor
from espl_jax.evolution import lineage
from espl_jax.evolution.population import Population, from_json, prompt_from_json
from espl_jax.evolution.reflection import Rejected
from espl_jax.models import lora
from espl_jax.parallel import processes
from espl_jax.rollouts.keys import stream_key
from espl_jax.rollouts.past import Past
from espl_jax.run.config import Config
from espl_jax.run.context import check_first_prompts
from espl_jax.run.inputs import Fingerprints, changes
from espl_jax.run.parts import Parts, abstract_run_state
from espl_jax.run.roots import first_population
from espl_jax.storage.workdir import WorkDir, read_checkpoint
from espl_jax.training.state import TrainState, init_train_state
from espl_jax.types import SystemPrompt

MAY_CHANGE = (
    "num_iterations",
    "checkpoint_every",
    "checkpoint_keep",
    "compilation_cache",
    "compile_ahead",
    "profile_iteration",
    "optimizer.max_skipped",
    "resume",
    "trackers",
    "tracking",
    "logs",
    "report",
    *(
        f"reflection.{name}"
        for name in ("base_url", "api_key_variable", "concurrency", "timeout", "max_retries")
    ),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The mutable state of a run, which an iteration replaces and a checkpoint saves.

    Attributes:
      iteration: iterations done.
      root: the oldest of the initial prompts.
      train_state: trainable weights and optimizer state; None if only prompts change.
      population: the prompts with their ratings.
      cursor: position in the training problems.
      skipped: updates skipped because all advantages were zero.
      not_finite_in_row: consecutive updates skipped because their loss or gradient was not finite.
      rejected: edits that evolution rejected lately, newest last.
      inputs: fingerprints of the inputs.
      past: rollouts so far in which drafts are looked up; empty without drafts. Not saved, but read from the
        log of rollouts.
    """

    iteration: int
    root: SystemPrompt
    train_state: TrainState | None
    population: Population
    cursor: Cursor
    skipped: int = 0
    not_finite_in_row: int = 0
    rejected: tuple[Rejected, ...] = ()
    inputs: Fingerprints = dataclasses.field(default_factory=dict)
    past: Past = dataclasses.field(default_factory=Past)


def save(workdir: WorkDir, run: Run) -> None:
    """Saves a checkpoint of everything that later iterations depend on."""
    population = run.population.to_json()
    state = {
        "root": dataclasses.asdict(run.root),
        "population": population,
        "cursor": dataclasses.asdict(run.cursor),
        "skipped": run.skipped,
        "not_finite_in_row": run.not_finite_in_row,
        "rejected": [list(each) for each in run.rejected],
        "inputs": run.inputs,
    }
    workdir.save(run.iteration, run.train_state, state)
    workdir.write_json("population.json", population)


def stop_if_stuck(workdir: WorkDir, run: Run, config: Config) -> None:
    """Saves the state and raises RuntimeError after too many consecutive non-finite updates."""
    if run.not_finite_in_row <= config.optimizer.max_skipped:
        return
    if run.iteration % config.checkpoint_every and run.iteration != config.num_iterations:
        save(workdir, run)
    raise RuntimeError(
        f"optimizer.max_skipped={config.optimizer.max_skipped}: {run.not_finite_in_row} consecutive updates "
        "had a loss or gradient that was not finite. The weights before them are saved as the checkpoint of "
        f"iteration {run.iteration}; lower optimizer.learning_rate in a new run, or resume this run with a "
        "larger optimizer.max_skipped"
    )


def restore(workdir: WorkDir, config: Config, parts: Parts) -> Run:
    """Returns the state in the newest checkpoint, or the initial state if there is none.

    Raises:
      ValueError: as `WorkDir.restore`, or if input files were replaced since the checkpoint.
    """
    check_inputs(workdir, config, parts.inputs)
    saved = workdir.restore(_shapes(config, parts))
    if saved is None:
        population = processes.decide(lambda: first_population(config))
        check_first_prompts(population, config, parts.splits, parts.reference, parts.environment)
        for member in population.members:
            workdir.append("lineage", lineage.entry("root", member, 0))
        state = first_train_state(config, parts)
        return Run(0, population.members[0], state, population, Cursor(config.seed), inputs=parts.inputs)
    iteration, train_state, state = saved
    workdir.write_json("population.json", state["population"])
    return Run(
        iteration,
        prompt_from_json(state["root"]),
        train_state,
        from_json(state["population"]),
        Cursor(**state["cursor"]),
        state["skipped"],
        state["not_finite_in_row"],
        tuple(Rejected(*each) for each in state.get("rejected", ())),
        state["inputs"] | parts.inputs,
        workdir.reduce("rollouts", Past.of_records) if parts.sampling.draft_tokens else Past(),
    )


def check_inputs(workdir: WorkDir, config: Config, now: Fingerprints) -> None:
    """Compares the inputs of a run with those recorded in its newest checkpoint.

    Raises:
      ValueError: if an input was replaced and `resume.changed_inputs` is "refuse".
    """
    saved = read_checkpoint(workdir.path, None)
    if saved is None:
        return
    iteration, _, state = saved
    for field, names in changes(state["inputs"], now).items():
        value = functools.reduce(operator.getitem, field.split("."), config)
        said = f"{field}={value!r}: {', '.join(names)} changed since the checkpoint of iteration {iteration}"
        if config.resume.changed_inputs == "refuse":
            raise ValueError(
                f"{said}; restore the original files, use another --workdir, or resume with "
                "--config.resume.changed_inputs=allow"
            )
        logging.warning("%s; the run continues with the new files", said)


def first_train_state(config: Config, parts: Parts) -> TrainState | None:
    """Returns the initial train state: fresh adapters, or a float32 copy of the params."""
    if not parts.trains:
        return None
    model = parts.reference

    def make(key: jax.Array, params: Any) -> TrainState:
        if parts.lora:
            trainable = lora.init(key, model.config, config.lora.rank, tuple(config.lora.targets))
        else:
            trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
        return init_train_state(trainable, parts.optimizer)

    arguments = stream_key(config.seed, "adapters", 0), None if parts.lora else model.params
    if parts.mesh is None:
        return make(*arguments)
    # Jitted, so that no array is ever materialized unsharded on one device.
    shardings = jax.tree.map(lambda x: x.sharding, _shapes(config, parts))
    return jax.jit(make, out_shardings=shardings)(*arguments)


def _shapes(config: Config, parts: Parts) -> TrainState | None:
    return abstract_run_state(config, parts.reference.config, parts.optimizer, parts.mesh)
