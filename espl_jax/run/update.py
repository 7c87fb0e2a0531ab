"""One iteration's updates of the weights, from its rollouts."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from espl_jax.console.progress import Progress
from espl_jax.parallel import sharding
from espl_jax.rl.advantages import advantages
from espl_jax.rollouts.keys import stable_hash
from espl_jax.run.parts import Parts
from espl_jax.training.batches import prompt_numbers, train_batches
from espl_jax.training.state import TrainState
from espl_jax.training.step import batch_logprobs, place_batch, policy_gradient_step
from espl_jax.types import Rollouts, TrainBatch


def update(
    state: TrainState | None,
    rollouts: Rollouts,
    parts: Parts,
    c: Any,
    iteration: int,
    progress: Progress,
    skipped_before: int = 0,
) -> tuple[TrainState | None, dict[str, float]]:
    """Advantages, and a policy-gradient step for each epoch and minibatch.

    Args:
      state: donated; None where nothing is trained.
      rollouts: the iteration's.
      parts, c: of the run.
      iteration: its number, which the minibatches are drawn with.
      progress: where steps that are skipped are reported.
      skipped_before: how many steps before this iteration were skipped, in a row.

    Returns:
      (state, metrics), the metrics empty where there was nothing to learn: means over the steps taken of what
      `policy_gradient_step` returns; `updates`, how many were taken; `not_finite`, how many were skipped
      because their loss or gradient was not finite; `not_finite_in_row`, those skipped since the last one
      taken, earlier iterations included.
    """
    if state is None:
        return None, {}
    with progress.phase("update"):
        batches = [place_batch(each, parts.mesh) for each in _batches(rollouts, parts, c, iteration)]
        if not batches:
            return state, {}
        if c.loss.epochs * c.loss.minibatches > 1 and parts.loss["loss"].needs_old_logprobs:
            batches = [_with_old_logprobs(batch, state, parts) for batch in batches]
        steps = []
        for _ in range(c.loss.epochs):
            for batch in batches:
                state, metrics = policy_gradient_step(*parts.step_arguments(state, batch), **parts.loss)
                steps.append(metrics)
        # Reflection on the same devices would wait for it anyway, and its time belongs here.
        steps = jax.device_get(jax.block_until_ready(steps))
    return state, _summary(steps, rollouts, iteration, progress, skipped_before)


def _batches(rollouts: Rollouts, parts: Parts, c: Any, iteration: int) -> list[TrainBatch]:
    gains = advantages(
        rollouts.rewards, c.loss.baseline, prompt_numbers(rollouts), c.loss.normalize_advantages
    )
    return train_batches(
        rollouts,
        np.asarray(gains),
        parts=sharding.row_parts(parts.mesh),
        microbatch_rows=c.loss.microbatch_rows,
        minibatches=c.loss.minibatches,
        rng=np.random.default_rng([c.seed, stable_hash("minibatches"), iteration]),
        every_group=c.loss.kl_coef > 0,
        mask_truncated=c.loss.mask_truncated,
    )


def _with_old_logprobs(batch: TrainBatch, state: TrainState, parts: Parts) -> TrainBatch:
    scored = batch_logprobs(
        state.trainable,
        parts.frozen,
        batch,
        parts.reference.config,
        temperature=parts.loss["temperature"],
        microbatch_rows=parts.loss["microbatch_rows"],
    )
    return batch._replace(old_logprobs=scored)


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
            f"Iteration {iteration}: {sum(skipped)} of {len(steps)} updates skipped, their loss or gradient "
            f"was not finite. Prompts: {', '.join(prompts)}. Problems: {', '.join(problems)}."
        )
    means = {name: float(np.mean([metrics[name] for metrics in taken])) for name in (taken or [{}])[0]}
    return means | {"updates": len(taken), "not_finite": sum(skipped), "not_finite_in_row": in_row}
