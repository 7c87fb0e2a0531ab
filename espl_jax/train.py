"""The E-SPL loop (Zhang et al. 2026, arXiv 2602.14697): weights and prompts learn from the same rollouts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from espl_jax.console.progress import Progress
from espl_jax.data.order import Cursor, next_batch
from espl_jax.evolution.deployment import deployed
from espl_jax.evolution.evolve import evolve, outcome
from espl_jax.evolution.population import Population
from espl_jax.evolution.ratings import inflate, rate
from espl_jax.evolution.reflection import Offspring
from espl_jax.evolution.selection import select
from espl_jax.parallel import processes
from espl_jax.rollouts.collect import collect_rollouts
from espl_jax.rollouts.keys import stable_hash, stream_key
from espl_jax.rollouts.records import means
from espl_jax.run import logs
from espl_jax.run.config import Config
from espl_jax.run.finish import evaluate_on, finish
from espl_jax.run.job import Job
from espl_jax.run.parts import Parts, assemble, rollout_sizes
from espl_jax.run.reflection import Beside, MakeReflect, open_reflectors
from espl_jax.run.state import MAY_CHANGE, Run, restore, save, stop_if_stuck
from espl_jax.run.update import Updated, update
from espl_jax.run.weights import settle_numerics
from espl_jax.sampling.sizes import describe
from espl_jax.storage.workdir import WorkDir
from espl_jax.training.state import TrainState
from espl_jax.types import Problem, Reflect, Rollouts, SystemPrompt, counts_of


def train(config: Config, workdir: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Runs the whole loop and then the test, or goes on where a killed process stopped.

    Args:
      config: the run's configuration, which `check_config` has passed.
      workdir: `run_state` says what is written there.
      console: where progress is shown; standard output by default.

    Returns:
      What `results.json` holds: the test by weights and prompt, and the prompt to deploy.
    """
    config = settle_numerics(config, workdir)
    processes.agree("the configuration", config.to_dict())
    console = console if processes.is_first() else Console(quiet=True)
    with contextlib.ExitStack() as stack:
        folder = WorkDir(workdir, config.to_dict(), may_change=MAY_CHANGE, keep=config.checkpoint_keep)
        stack.enter_context(folder)
        parts = assemble(config)
        make_reflect = stack.enter_context(open_reflectors(config, parts, folder.path))
        run = restore(folder, config, parts)
        with Progress(config.num_iterations, folder.append, done=run.iteration, console=console) as progress:
            progress.say(
                f"Rollouts: {describe(rollout_sizes(config, parts))}, each compiled when first needed."
            )
            for line in left_out(parts):
                progress.say(line)
            if run.iteration:
                progress.say(f"resumed after iteration {run.iteration}")
            job = Job(config, parts, folder, progress)
            for iteration in range(run.iteration + 1, config.num_iterations + 1):
                with profile(config, folder, iteration):
                    run = iterate(job, run, make_reflect)
                if iteration % config.checkpoint_every == 0 or iteration == config.num_iterations:
                    save(folder, run)
                stop_if_stuck(folder, run, config)
            return finish(job, parts.policy(run.train_state), run.root, run.population)


def left_out(parts: Parts) -> list[str]:
    """A line for each split that lacks problems, too long for the context."""
    return [
        f"Left out of data.{split}, too long for the context: {len(ids)} problems ({', '.join(ids)})."
        for split, ids in parts.left_out.items()
    ]


def iterate(job: Job, run: Run, make_reflect: MakeReflect) -> Run:
    """One iteration: rollouts, and the two branches that learn from them, weights and prompts."""
    config, parts = job.config, job.parts
    iteration = run.iteration + 1
    policy = parts.policy(run.train_state)

    prompts, problems, cursor, rng = choose(run.population, run.cursor, iteration, parts, config)
    with job.progress.phase("rollouts"):
        rollouts = collect_rollouts(
            policy,
            prompts,
            problems,
            parts.environment,
            key=stream_key(config.seed, "train", iteration),
            group_size=config.num_prompts * config.group_size // len(prompts),
            sampling=parts.sampling,
            chat=parts.chat,
            capacity=parts.capacity,
        )
    ids, values = list(rollouts.slots()), rollouts.score_matrix().mean(axis=1)

    rated = run.population
    if parts.evolves:
        rated = rate(rated, ids, values, config.ratings.tie_margin, config.ratings.system, iteration)
    reflect = make_reflect(policy, iteration)
    del policy  # what of it was laid out for sampling makes room for the update
    train_state, learned, offspring, times = learn(job, run, rated, rollouts, reflect, rng)

    children = [each.child for each in offspring.values() if each.child]
    added = rated.add(children, iteration, config.evolution.allow_duplicates)
    drift = config.ratings.drift_sigma if learned.get("updates") else 0.0
    population = inflate(added.population, drift)
    processes.agree(f"iteration {iteration}", (rollouts, learned, offspring, population, cursor))
    skipped = run.skipped + int(parts.trains and not learned)
    best = deployed(population, config.mode, config.deployment).prompt
    record = {
        **means(rollouts),
        **learned,
        **outcome(offspring, added),
        "skipped_updates": skipped,
        "tournament": {"prompts": ids, "values": values},
        "best_prompt": {"id": best.id, "mu": best.mu, "sigma": best.sigma},
        "population": len(population.members),
        "drift_sigma": drift,
        "reflector": counts_of(reflect),
        "time": times,
    }
    del reflect  # it holds what was laid out for sampling, which evaluation does again
    logs.write(job.workdir, iteration, rollouts, offspring, added)
    if config.evaluation.every and iteration % config.evaluation.every == 0:
        with job.progress.phase("evaluation"):
            model = parts.policy(train_state)
            (validation,) = evaluate_on(job, "validation", model, "current", [best], iteration)
            record |= {"validation": dataclasses.asdict(validation), "held_out": validation.accuracy}
    job.progress.report(iteration, record)
    not_finite = int(learned.get("not_finite_in_row", run.not_finite_in_row))
    return Run(iteration, run.root, train_state, population, cursor, skipped, not_finite, run.inputs)


class Beginning(NamedTuple):
    """What an iteration begins with.

    Attributes:
      prompts: M.
      problems: B.
      cursor: which problems come after these.
      rng: draws the iteration's later choices.
    """

    prompts: tuple[SystemPrompt, ...]
    problems: tuple[Problem, ...]
    cursor: Cursor
    rng: np.random.Generator


def choose(population: Population, cursor: Cursor, iteration: int, parts: Parts, config: Config) -> Beginning:
    """Chooses what an iteration begins with."""
    rng = np.random.default_rng([config.seed, stable_hash("selection"), iteration])
    prompts = choose_prompts(population, parts, config, rng)
    problems, cursor = next_batch(parts.splits["train"], cursor, config.batch_size)
    return Beginning(prompts, problems, cursor, rng)


def choose_prompts(
    population: Population, parts: Parts, config: Config, rng: np.random.Generator
) -> tuple[SystemPrompt, ...]:
    """The M prompts of an iteration; the root alone in `rl`, the newest alone in `reflection`."""
    if not parts.evolves:
        return population.members[:1]
    if config.mode == "reflection":
        return population.newest(1)
    s = config.selection
    return select(population, config.num_prompts, s.strategy, rng, s.window, s.optimism, s.temperature)


class Learned(NamedTuple):
    """What both branches made of an iteration's rollouts.

    Attributes:
      state: the train state.
      metrics: of the update.
      offspring: by operator.
      times: seconds of reflection that nothing else counts.
    """

    state: TrainState | None
    metrics: dict[str, float]
    offspring: dict[str, Offspring]
    times: dict[str, float]


def learn(
    job: Job,
    run: Run,
    population: Population,
    rollouts: Rollouts,
    reflect: Reflect,
    rng: np.random.Generator,
) -> Learned:
    """Both branches: the weights' update, and what evolution makes of the prompts."""

    def generation() -> dict[str, Offspring]:
        return evolve(population, rollouts, reflect, rng, job.parts.evolution)

    def step() -> Updated:
        return update(job, run.train_state, rollouts, run.iteration + 1, run.not_finite_in_row)

    if not job.parts.evolves:
        return Learned(*step(), offspring={}, times={})
    if job.config.reflection.reflector != "local":
        beside = Beside(generation)
        state, metrics = step()
        with job.progress.phase("reflection"):
            offspring = beside.result()
        return Learned(state, metrics, offspring, beside.times())
    # Reflection by the current weights comes before the update, which gives their memory away.
    with job.progress.phase("reflection"):
        offspring = generation()
    return Learned(*step(), offspring=offspring, times={})


@contextlib.contextmanager
def profile(config: Config, workdir: WorkDir, iteration: int) -> Iterator[None]:
    """Writes a trace of the iteration that `profile_iteration` names, for TensorBoard or Perfetto."""
    if iteration != config.profile_iteration:
        yield
        return
    with jax.profiler.trace(str(workdir.path / "profile")):
        yield
