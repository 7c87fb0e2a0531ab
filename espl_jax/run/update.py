"""Updates the weights with the rollouts of an iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from espl_jax.console.progress import Progress
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import Params
from espl_jax.parallel import processes, sharding
from espl_jax.parallel.ahead import Call, abstract
from espl_jax.rl.advantages import advantages
from espl_jax.rollouts.encode import encode_tree
from espl_jax.rollouts.keys import stable_hash
from espl_jax.run.check_groups import records_routing
from espl_jax.run.config import Config
from espl_jax.run.job import Job
from espl_jax.run.parts import objective_of
from espl_jax.run.workloads import Lengths, lanes_of
from espl_jax.sampling.programs import BETWEEN
from espl_jax.sampling.truncation import Truncation
from espl_jax.training.batches import abstract_batch, prompt_numbers, train_batches
from espl_jax.training.state import TrainState
from espl_jax.training.step import batch_logprobs, place_batch, policy_gradient_step
from espl_jax.types import Problem, Rollouts, SystemPrompt, TrainBatch


class Updated(NamedTuple):
    """The result of the updates of an iteration.

    Attributes:
      state: the train state; None if nothing is trained.
      metrics: empty if all advantages were zero. Otherwise the metrics of `policy_gradient_step`, averaged
        over the updates taken; `updates`, the number taken; `not_finite`, the number skipped because the loss
        or gradient was not finite; `not_finite_in_row`, the number skipped since the last update taken,
        including earlier iterations; `trained_tokens`, the tokens of all updates.
    """

    state: TrainState | None
    metrics: dict[str, float]


def update(
    job: Job, state: TrainState | None, rollouts: Rollouts, iteration: int, skipped_before: int = 0
) -> Updated:
    """Computes advantages and takes a policy-gradient step for each epoch and minibatch.

    Args:
      job: the run.
      state: donated; None if nothing is trained.
      rollouts: the iteration's rollouts.
      iteration: seeds the split into minibatches.
      skipped_before: consecutive updates skipped just before this iteration.
    """
    if state is None:
        return Updated(None, {})
    config, parts = job.config, job.parts
    with job.progress.phase("update"):
        batches = _batches(job, rollouts, iteration)
        if not batches:
            return Updated(state, {})
        trained_tokens = config.loss.epochs * sum(int(each.mask.sum()) for each in batches)
        batches = [place_batch(each, parts.mesh) for each in batches]
        if config.loss.epochs * config.loss.minibatches > 1 and parts.objective.loss.needs_old_logprobs:
            batches = [_with_old_logprobs(job, batch, state) for batch in batches]
        steps, after = [], state
        for _ in range(config.loss.epochs):
            for batch in batches:
                arguments = parts.step_arguments(after, batch)
                after, metrics = job.ahead.call(
                    policy_gradient_step, *arguments, microbatch_rows=config.loss.microbatch_rows
                )
                steps.append(metrics)
        # Wait here, so that the time of the update is not counted in the next phase on these devices.
        steps = jax.device_get(jax.block_until_ready(steps))
    summary = _summary(steps, rollouts, iteration, job.progress, skipped_before)
    return Updated(after, summary | {"trained_tokens": trained_tokens})


def update_calls(
    config: Config,
    decoder: DecoderConfig,
    state: TrainState,
    base: Params,
    optimizer: optax.GradientTransformation,
    lengths: Lengths,
    mesh: Mesh | None,
) -> list[Call]:
    """Returns the calls of an update on the largest batch (all groups have a gradient, and a rollout has the
    maximum length): the scoring before the first of several steps, if there is one, then the step.

    Args:
      config: the run's configuration.
      decoder: the model's configuration.
      state: abstract train state.
      base: abstract params of the model as loaded.
      optimizer: the optimizer of the run.
      lengths: most tokens at each level.
      mesh: the mesh, or None.
    """
    prompts, loss = lanes_of(config), config.loss
    truncated = bool(Truncation(config.sampling.top_k, config.sampling.top_p, config.sampling.min_p))
    batch = abstract_batch(
        prompts=prompts,
        groups=-(-prompts * config.batch_size // loss.minibatches),
        group_size=config.num_prompts // prompts * config.group_size,
        system_tokens=lengths.system,
        problem_tokens=lengths.problem,
        new_tokens=lengths.new,
        cutoffs=truncated,
        routing=decoder.routing_shape if decoder.experts and records_routing(config) else None,
        shards=sharding.row_shards(mesh),
        microbatch_rows=loss.microbatch_rows,
    )
    batch = place_batch(batch, mesh)
    objective, rows = objective_of(config), {"microbatch_rows": loss.microbatch_rows}
    frozen = base if config.lora.rank else None
    reference = base if loss.kl_coef else None
    calls = []
    if loss.epochs * loss.minibatches > 1 and objective.loss.needs_old_logprobs:
        scored = {"temperature": objective.temperature, "replay_routing": objective.replay_routing}
        calls.append(Call(batch_logprobs, (state.trainable, frozen, batch, decoder), scored | rows))
        batch = batch._replace(old_logprobs=batch.sampler_logprobs)
    given = state, frozen, reference, batch, decoder, optimizer, objective
    return [*calls, Call(policy_gradient_step, given, rows)]


def compile_update_ahead(
    job: Job, state: TrainState | None, prompts: Sequence[SystemPrompt], problems: Sequence[Problem]
) -> None:
    """Compiles the update of an iteration in the background, if its shapes are known before the rollouts.

    That takes microbatches, with which the shapes do not depend on the number of groups that have a gradient.
    They still depend on the longest rollout: the update is compiled for one of maximum length.

    Args:
      job: the run.
      state: the train state; None if nothing is trained.
      prompts, problems: of the iteration.
    """
    config, parts = job.config, job.parts
    if state is None or not job.ahead.on or not config.loss.microbatch_rows:
        return
    model = parts.reference
    systems, rests = encode_tree(
        model.tokenizer, prompts, problems, parts.environment, parts.chat.template_arguments
    )
    longest = max(len(tokens) for lane in rests for tokens in lane)
    lengths = Lengths(max(map(len, systems)), longest, config.sampling.max_new_tokens)
    given = abstract(state), abstract(model.params), parts.optimizer, lengths, parts.mesh
    calls = update_calls(config, model.config, *given)
    job.ahead.add("Update", [dataclasses.replace(call, urgency=BETWEEN) for call in calls])


def _batches(job: Job, rollouts: Rollouts, iteration: int) -> list[TrainBatch]:
    config = job.config
    weights = advantages(
        rollouts.rewards, config.loss.baseline, prompt_numbers(rollouts), config.loss.normalize_advantages
    )
    return train_batches(
        rollouts,
        np.asarray(weights),
        shards=sharding.row_shards(job.parts.mesh),
        microbatch_rows=config.loss.microbatch_rows,
        minibatches=config.loss.minibatches,
        rng=np.random.default_rng([config.seed, stable_hash("minibatches"), iteration]),
        every_group=config.loss.kl_coef > 0,
        mask_truncated=config.loss.mask_truncated,
    )


def _with_old_logprobs(job: Job, batch: TrainBatch, state: TrainState) -> TrainBatch:
    scored = job.ahead.call(
        batch_logprobs,
        state.trainable,
        job.parts.frozen,
        batch,
        job.parts.reference.config,
        temperature=job.parts.objective.temperature,
        replay_routing=job.parts.objective.replay_routing,
        microbatch_rows=job.config.loss.microbatch_rows,
    )
    return batch._replace(old_logprobs=scored)


def trainer_logprobs(job: Job, state: TrainState | None, rollouts: Rollouts) -> np.ndarray | None:
    """Scores all rollouts of an iteration under the trainer's weights before its update.

    Args:
      job: the run.
      state: the train state; None if nothing is trained.
      rollouts: the iteration's rollouts.

    Returns:
      float32 [M, B, N, T], under the sampling distribution; 0 for tokens that were not sampled. None if
      nothing is trained, or a group has no sampled token.
    """
    if state is None or not rollouts.drawn.any(axis=(2, 3)).all():
        return None
    with job.progress.phase("trainer logprobs"):
        (batch,) = train_batches(
            rollouts,
            np.ones(rollouts.rewards.shape, np.float32),
            shards=sharding.row_shards(job.parts.mesh),
            microbatch_rows=job.config.loss.microbatch_rows,
            every_group=True,
        )
        batch = _with_old_logprobs(job, place_batch(batch, job.parts.mesh), state)
        assert batch.old_logprobs is not None
        rows = processes.whole(batch.old_logprobs)
    # The rows of all shards, in order, are the rollouts in order: no group was left out.
    scored = np.zeros(rollouts.tokens.shape, np.float32)
    rows = rows.reshape(-1, rows.shape[-1])[: rollouts.rewards.size, : rollouts.tokens.shape[-1]]
    scored.reshape(-1, rollouts.tokens.shape[-1])[:, : rows.shape[-1]] = rows
    return np.where(rollouts.drawn, scored, 0.0)


def _summary(
    steps: list[dict[str, Any]], rollouts: Rollouts, iteration: int, progress: Progress, skipped_before: int
) -> dict[str, float]:
    skipped = [bool(metrics.pop("skipped")) for metrics in steps]
    taken = [metrics for metrics, left_out in zip(steps, skipped, strict=True) if not left_out]
    in_row = skipped_before
    for left_out in skipped:
        in_row = in_row + 1 if left_out else 0
    if any(skipped):
        prompts, problems = rollouts.slots(), [problem.id for problem in rollouts.problems]
        progress.say(
            f"Iteration {iteration}: {sum(skipped)} of {len(steps)} updates skipped: their loss or gradient "
            f"was not finite. Prompts: {', '.join(prompts)}. Problems: {', '.join(problems)}."
        )
    means = {name: float(np.mean([metrics[name] for metrics in taken])) for name in (taken or [{}])[0]}
    return means | {"updates": len(taken), "not_finite": sum(skipped), "not_finite_in_row": in_row}
