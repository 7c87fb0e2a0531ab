"""The E-SPL loop (Zhang et al. 2026, arXiv 2602.14697): the same rollouts train weights and prompts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from espl_jax.console.progress import Progress
from espl_jax.console.tables import duration
from espl_jax.data.order import Cursor, next_batch
from espl_jax.evolution.deployment import deployed
from espl_jax.evolution.evolve import evolve, outcome
from espl_jax.evolution.population import Population
from espl_jax.evolution.ratings import inflate, rate
from espl_jax.evolution.reflection import Offspring
from espl_jax.evolution.selection import select
from espl_jax.parallel import processes
from espl_jax.parallel.ahead import CompileAhead, counted, threads_for
from espl_jax.report.write import RunReport
from espl_jax.rollouts.collect import collect_rollouts
from espl_jax.rollouts.keys import stable_hash, stream_key
from espl_jax.rollouts.records import means
from espl_jax.run import logs, machine
from espl_jax.run.check_groups import records_routing
from espl_jax.run.config import Config
from espl_jax.run.finish import evaluate_on, finish
from espl_jax.run.job import Job
from espl_jax.run.parts import Parts, assemble, rollout_shapes
from espl_jax.run.reflection import Beside, MakeReflect, open_reflectors
from espl_jax.run.state import MAY_CHANGE, Run, restore, save, stop_if_stuck
from espl_jax.run.update import Updated, compile_update_ahead, trainer_logprobs, update
from espl_jax.run.weights import settle_numerics
from espl_jax.sampling.programs import describe
from espl_jax.storage import status
from espl_jax.storage.workdir import WorkDir
from espl_jax.trackers.start import tracking
from espl_jax.training.state import TrainState
from espl_jax.types import Problem, Reflect, Rollouts, SystemPrompt, counts_of

REMEMBERED = 64
"""Refused edits that a run keeps, of which the reflector is shown the newest."""


def train(config: Config, workdir: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Runs the training loop and the test, or resumes from the newest checkpoint in `workdir`.

    Args:
      config: the run's configuration; must have passed `check_config`.
      workdir: the work directory; see `storage.workdir` for its contents.
      console: console for progress; standard output by default.

    Returns:
      The contents of `results.json`: test results by weights and prompt, and the prompt to deploy.
    """
    config = settle_numerics(config, workdir)
    processes.agree("the configuration", config.to_dict())
    console = console if processes.is_first() else Console(quiet=True)
    with contextlib.ExitStack() as stack:
        folder = WorkDir(workdir, config.to_dict(), may_change=MAY_CHANGE, keep=config.checkpoint_keep)
        stack.enter_context(folder)
        show = stack.enter_context(status.written(folder.path, config.num_iterations, processes.is_first()))
        parts = assemble(config)
        make_reflect = stack.enter_context(open_reflectors(config, parts, folder.path))
        run = restore(folder, config, parts)
        with (
            Progress(
                config.num_iterations, folder.append, done=run.iteration, console=console, listen=show
            ) as progress,
            tracking(config.to_dict(), str(folder.path), progress.say) as update_trackers,
            CompileAhead(threads_for(config.compile_ahead), say_compiled(progress)) as ahead,
        ):
            when = "compiled ahead in the background" if ahead.on else "each compiled when first needed"
            progress.say(f"Rollouts: {describe(rollout_shapes(config, parts))}, {when}.")
            for line in left_out(parts):
                progress.say(line)
            if run.iteration:
                progress.say(f"resumed after iteration {run.iteration}")
            job = Job(config, parts, folder, progress, ahead)
            report = RunReport(folder, parts.reference, progress.say)
            for iteration in range(run.iteration + 1, config.num_iterations + 1):
                with profile(config, folder, iteration):
                    run = iterate(job, run, make_reflect)
                if iteration % config.checkpoint_every == 0 or iteration == config.num_iterations:
                    save(folder, run)
                    machine.write(folder)
                    update_trackers()
                stop_if_stuck(folder, run, config)
                if config.report.every and iteration % config.report.every == 0:
                    report.write()
            results = finish(job, parts.policy(run.train_state), run.root, run.population)
            update_trackers()
            report.write()
            return results


def say_compiled(progress: Progress) -> Callable[[str, int, float], None]:
    """Returns a function that says how long programs took to compile, for `CompileAhead`."""

    def finished(title: str, count: int, seconds: float) -> None:
        progress.say(f"{title}: {counted(count)} compiled in {duration(seconds)}.")

    return finished


def left_out(parts: Parts) -> list[str]:
    """Returns a line for each split with problems that are too long for the context."""
    return [
        f"data.{split}: dropped {len(ids)} problems that are too long for the context ({', '.join(ids)})."
        for split, ids in parts.left_out.items()
    ]


def iterate(job: Job, run: Run, make_reflect: MakeReflect) -> Run:
    """Runs one iteration: rollouts, then the update of the weights and the evolution of the prompts."""
    config, parts = job.config, job.parts
    iteration = run.iteration + 1
    policy = parts.policy(run.train_state)

    prompts, problems, cursor, rng = choose(run.population, run.cursor, iteration, parts, config)
    compile_update_ahead(job, run.train_state, prompts, problems)
    with job.progress.phase("rollouts"):
        rollouts = collect_rollouts(
            policy,
            prompts,
            problems,
            parts.environment,
            key=stream_key(config.seed, "train", iteration),
            group_size=config.num_prompts * config.group_size // len(prompts),
            sampling=dataclasses.replace(parts.sampling, record_routing=records_routing(config)),
            chat=parts.chat,
            capacity=dataclasses.replace(parts.capacity, ahead=job.ahead),
            past=run.past.on(problems),
        )
    ids, values = list(rollouts.slots()), rollouts.score_matrix().mean(axis=1)

    rated = run.population
    if parts.evolves:
        rated = rate(rated, ids, values, config.ratings.tie_margin, config.ratings.system, iteration)
    reflect = make_reflect(policy, iteration)
    del policy  # frees the copy in the sampling layout before the update
    scored = trainer_logprobs(job, run.train_state, rollouts) if config.logs.trainer_logprobs else None
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
    del reflect  # holds a copy in the sampling layout; evaluation makes its own
    logs.write(
        job.workdir,
        iteration,
        rollouts,
        offspring,
        added,
        token_logprobs=config.logs.token_logprobs,
        trainer_logprobs=scored,
    )
    if config.evaluation.every and iteration % config.evaluation.every == 0:
        with job.progress.phase("evaluation"):
            model = parts.policy(train_state)
            (validation,) = evaluate_on(job, "validation", model, "current", [best], iteration)
            record |= {"validation": dataclasses.asdict(validation), "held_out": validation.accuracy}
    job.progress.report(iteration, record)
    not_finite = int(learned.get("not_finite_in_row", run.not_finite_in_row))
    refused = [*run.rejected, *(edit for each in offspring.values() for edit in each.rejected)]
    return dataclasses.replace(
        run,
        iteration=iteration,
        train_state=train_state,
        population=population,
        cursor=cursor,
        skipped=skipped,
        not_finite_in_row=not_finite,
        rejected=tuple(dict.fromkeys(refused))[-REMEMBERED:],
        past=run.past.with_rollouts(rollouts) if parts.sampling.draft_tokens else run.past,
    )


class Beginning(NamedTuple):
    """The inputs of an iteration.

    Attributes:
      prompts: the M system prompts.
      problems: the B problems.
      cursor: position of the next problems.
      rng: random generator for later choices of the iteration.
    """

    prompts: tuple[SystemPrompt, ...]
    problems: tuple[Problem, ...]
    cursor: Cursor
    rng: np.random.Generator


def choose(population: Population, cursor: Cursor, iteration: int, parts: Parts, config: Config) -> Beginning:
    """Chooses the prompts and problems of an iteration."""
    rng = np.random.default_rng([config.seed, stable_hash("selection"), iteration])
    prompts = choose_prompts(population, parts, config, rng)
    problems, cursor = next_batch(parts.splits["train"], cursor, config.batch_size)
    return Beginning(prompts, problems, cursor, rng)


def choose_prompts(
    population: Population, parts: Parts, config: Config, rng: np.random.Generator
) -> tuple[SystemPrompt, ...]:
    """Returns the M prompts of an iteration; only the root in mode `rl`, only the newest in `reflection`."""
    if not parts.evolves:
        return population.members[:1]
    if config.mode == "reflection":
        return population.newest(1)
    s = config.selection
    return select(population, config.num_prompts, s.strategy, rng, s.window, s.optimism, s.temperature)


class Learned(NamedTuple):
    """The results of the update and of evolution in an iteration.

    Attributes:
      state: the train state.
      metrics: metrics of the update.
      offspring: outcome of evolution, by operator.
      times: seconds of reflection not covered by the phases.
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
    """Updates the weights and evolves the prompts."""

    def generation() -> dict[str, Offspring]:
        return evolve(population, rollouts, reflect, rng, job.parts.evolution, run.rejected)

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
    # Reflection may use the current weights, so it runs before the update donates them.
    with job.progress.phase("reflection"):
        offspring = generation()
    return Learned(*step(), offspring=offspring, times={})


@contextlib.contextmanager
def profile(config: Config, workdir: WorkDir, iteration: int) -> Iterator[None]:
    """Writes a trace of iteration `profile_iteration`, for TensorBoard or Perfetto."""
    if iteration != config.profile_iteration:
        yield
        return
    with jax.profiler.trace(str(workdir.path / "profile")):
        yield
