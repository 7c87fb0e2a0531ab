"""The E-SPL loop (Zhang et al. 2026, arXiv 2602.14697): weights and prompts learn from the same rollouts."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from espl_jax.assemble import Parts, assemble, first_population, first_train_state, stream_key
from espl_jax.data.order import Cursor, next_batch
from espl_jax.deploy import deployed, held_out, two_by_two
from espl_jax.evolution.crossover import crossover
from espl_jax.evolution.mutation import mutate
from espl_jax.evolution.population import Population, from_json
from espl_jax.evolution.ratings import ranking, rate
from espl_jax.evolution.reflection import Offspring
from espl_jax.evolution.selection import select
from espl_jax.metrics import Progress
from espl_jax.reflectors.local import local_reflector
from espl_jax.rl.advantages import advantages
from espl_jax.rollout import collect_rollouts, prompt_numbers, records, train_batch
from espl_jax.run_state import WorkDir
from espl_jax.train_step import TrainState, policy_gradient_step
from espl_jax.types import Rollouts, SystemPrompt

LOGS = ("metrics", "rollouts", "reflections", "lineage", "evaluations")
MAY_CHANGE = (
    "num_iterations",
    "checkpoint_every",
    "checkpoint_keep",
    "compilation_cache",
    "profile_iteration",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What an iteration changes, and what a checkpoint holds.

    Attributes:
      iteration: iterations done.
      train_state: trainable weights and optimizer state; None where only prompts change.
      population: the prompts with their ratings.
      cursor: which problems come next.
      skipped: updates left out because no group was mixed.
    """

    iteration: int
    train_state: TrainState | None
    population: Population
    cursor: Cursor
    skipped: int = 0


def train(config: Any, workdir: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Runs the whole loop and then the test, or goes on where a killed process stopped.

    Args:
      config: a ConfigDict that `check_config` has passed.
      workdir: `run_state` says what is written there.
      console: where progress is shown; standard output by default.

    Returns:
      What `results.json` holds: the test by weights and prompt, and the prompt to deploy.
    """
    parts = assemble(config)
    first = Run(0, first_train_state(config, parts), first_population(config), Cursor(config.seed))
    with WorkDir(
        workdir, config.to_dict(), may_change=MAY_CHANGE, logs=LOGS, keep=config.checkpoint_keep
    ) as folder:
        run = restore(folder, first)
        with Progress(config.num_iterations, folder.append, done=run.iteration, console=console) as progress:
            if run.iteration:
                progress.say(f"resumed after iteration {run.iteration}")
            for iteration in range(run.iteration + 1, config.num_iterations + 1):
                with profile(config, folder, iteration):
                    run = iterate(run, parts, config, folder, progress)
                if iteration % config.checkpoint_every == 0 or iteration == config.num_iterations:
                    save(folder, run)
            policy = parts.policy(run.train_state)
            return two_by_two(parts, policy, first.population, run.population, config, folder, progress)


def iterate(run: Run, parts: Parts, c: Any, workdir: WorkDir, progress: Progress) -> Run:
    """One iteration: rollouts, then the two branches that never see each other, weights and prompts."""
    iteration = run.iteration + 1
    rng = np.random.default_rng([c.seed, iteration])
    policy = parts.policy(run.train_state)
    prompts = choose_prompts(run.population, parts, c, rng)
    problems, cursor = next_batch(parts.splits["train"], run.cursor, c.batch_size)
    with progress.phase("rollouts"):
        rollouts = collect_rollouts(
            policy,
            prompts,
            problems,
            parts.environment,
            key=stream_key(c.seed, "train", iteration),
            group_size=c.group_size * c.num_prompts // len(prompts),
            max_new_tokens=c.sampling.max_new_tokens,
            temperature=c.sampling.temperature,
            **parts.sampling,
        )
    for record in records(rollouts):
        workdir.append("rollouts", {"iteration": iteration, **record})

    ids, values = list(rollouts.slots()), rollouts.score_matrix().mean(axis=1)
    population = run.population
    if parts.evolves:
        population = rate(population, ids, values, c.evolution.tie_margin)

    # The reference policy reflects while the update runs on the device; the current one needs its weights
    # before the update gives them away.
    train_state, metrics = run.train_state, {}
    if c.reflection.policy == "current":
        offspring = evolve(population, rollouts, policy, parts, c, iteration, rng, progress)
        train_state, metrics = update(run.train_state, rollouts, parts, c, progress)
    else:
        train_state, metrics = update(run.train_state, rollouts, parts, c, progress)
        offspring = evolve(population, rollouts, parts.reference, parts, c, iteration, rng, progress)

    children = [each.child for each in offspring.values() if each.child]
    population, accepted, rejected = population.add(children, iteration)
    for operator, each in offspring.items():
        for transcript in each.transcripts:
            workdir.append("reflections", {"iteration": iteration, "operator": operator, **transcript})
    for child in accepted:
        workdir.append("lineage", dataclasses.asdict(child))

    skipped = run.skipped + (parts.trains and not metrics)
    done = Run(iteration, train_state, population, cursor, skipped)
    best = deployed(population, parts, c)
    record = {
        **rollout_metrics(rollouts),
        **{name: float(x) for name, x in jax.device_get(metrics).items()},
        "skipped_updates": skipped,
        "tournament": {"prompts": ids, "values": values},
        "best_prompt": {"id": best.id, "mu": best.mu, "sigma": best.sigma},
        "population": len(population.members),
        "children": [child.id for child in accepted],
        "no_child": {operator: each.reason for operator, each in offspring.items() if each.reason}
        | {child.operator: reason for child, reason in rejected},
        "drops": dict(
            sum((collections.Counter(each.drops) for each in offspring.values()), collections.Counter())
        ),
    }
    if c.evaluation.every and iteration % c.evaluation.every == 0:
        with progress.phase("evaluation"):
            record["held_out"] = held_out(parts, parts.policy(train_state), best, c, iteration, workdir)
    progress.report(iteration, record)
    return done


def choose_prompts(
    population: Population, parts: Parts, c: Any, rng: np.random.Generator
) -> tuple[SystemPrompt, ...]:
    """Step 1: the M system prompts of an iteration; the root alone in `rl`, the newest alone in `reflection`."""
    if not parts.evolves:
        return (population.members[0],)
    if c.mode == "reflection":
        return population.newest(1)
    s = c.selection
    return select(population, c.num_prompts, s.strategy, rng, s.window, s.optimism, s.temperature)


def update(
    state: TrainState | None, rollouts: Rollouts, parts: Parts, c: Any, progress: Progress
) -> tuple[TrainState | None, dict[str, Any]]:
    """Steps 3 and 4: advantages and one policy-gradient step; no metrics where there was nothing to learn."""
    if state is None:
        return None, {}
    with progress.phase("update"):
        gains = np.asarray(advantages(rollouts.rewards, c.loss.baseline, prompt_numbers(rollouts)))
        batch = train_batch(rollouts, gains, max(1, c.loss.microbatch_rows // c.group_size))
        if batch is None:
            return state, {}
        return policy_gradient_step(
            state,
            parts.frozen,
            parts.reference.params if c.loss.kl_coef else None,
            parts.place_batch(batch),
            parts.reference.config,
            parts.optimizer,
            temperature=c.sampling.temperature,
            kl_coef=c.loss.kl_coef,
            loss=c.loss.kind,
            microbatch_rows=c.loss.microbatch_rows,
        )


def evolve(
    population: Population,
    rollouts: Rollouts,
    model: Any,
    parts: Parts,
    c: Any,
    iteration: int,
    rng: np.random.Generator,
    progress: Progress,
) -> dict[str, Offspring]:
    """Steps 6 and 7: what crossover and mutation came to, in the order in which children enter."""
    if not parts.evolves:
        return {}
    reflect = local_reflector(
        model,
        key=stream_key(c.seed, "reflection", iteration),
        max_new_tokens=c.reflection.max_new_tokens,
        temperature=c.reflection.temperature,
        max_input_tokens=c.reflection.max_input_tokens,
        **parts.sampling,
    )
    e = c.evolution
    limits = {"max_words": e.max_words, "max_principles": e.max_principles, "opening": c.reflection.opening}
    parents = [population.get(prompt.id) for prompt in rollouts.distinct()]
    values = rollouts.score_matrix().mean(axis=1)
    best = population.get(ranking([parent.id for parent in parents], values, e.tie_margin)[0][0])
    offspring = {}
    crosses = rng.random() < e.crossover_prob and c.mode != "reflection"
    if crosses and len(parents) > 1:
        with progress.phase("crossover"):
            offspring["crossover"] = crossover(
                parents,
                rollouts,
                reflect,
                win_margin=e.tie_margin,
                crossover_sigma=e.crossover_sigma,
                **limits,
            )
    with progress.phase("mutation"):
        offspring["mutation"] = mutate(
            best, rollouts, reflect, max_edits=e.max_edits, mutation_sigma=e.mutation_sigma, **limits
        )
    return offspring


def rollout_metrics(rollouts: Rollouts) -> dict[str, Any]:
    """Means over an iteration's rollouts, and how many (prompt, problem) groups had mixed rewards."""
    mixed = [
        rollouts.rewards[slots].max(axis=(0, 2)) > rollouts.rewards[slots].min(axis=(0, 2))
        for slots in rollouts.slots().values()
    ]
    return {
        "reward": rollouts.rewards.mean(dtype=np.float64),
        "success": rollouts.success.mean(dtype=np.float64),
        "truncated": rollouts.truncated.mean(dtype=np.float64),
        "new_tokens": rollouts.lengths.mean(dtype=np.float64),
        "mixed_groups": np.sum(mixed),
        "groups": np.size(mixed),
    }


def save(workdir: WorkDir, run: Run) -> None:
    """Makes a checkpoint of everything a later iteration depends on."""
    population = run.population.to_json()
    state = {"population": population, "cursor": dataclasses.asdict(run.cursor), "skipped": run.skipped}
    workdir.save(run.iteration, run.train_state, state)
    workdir.write_json("population.json", population)


def restore(workdir: WorkDir, first: Run) -> Run:
    """The run as of the newest checkpoint, or `first`."""
    saved = workdir.restore(first.train_state)
    if saved is None:
        return first
    iteration, train_state, state = saved
    workdir.write_json("population.json", state["population"])
    population = from_json(state["population"])
    return Run(iteration, train_state, population, Cursor(**state["cursor"]), state["skipped"])


@contextlib.contextmanager
def profile(c: Any, workdir: WorkDir, iteration: int) -> Iterator[None]:
    """Writes a trace of the iteration that `profile_iteration` names, for TensorBoard or Perfetto."""
    if iteration != c.profile_iteration:
        yield
        return
    with jax.profiler.trace(str(workdir.path / "profile")):
        yield
