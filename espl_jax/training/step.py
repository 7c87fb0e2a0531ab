"""Policy-gradient updates over the prefix tree.

Rollouts are processed in microbatches of rows. The two shared levels run forward once, every microbatch
attends to their caches, and the sum of the microbatches' cotangents is sent backward through them once. The
gradient therefore does not depend on the split into microbatches.
"""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import Params
from espl_jax.parallel import sharding
from espl_jax.rl.kl import kl_estimate
from espl_jax.rl.logprobs import target_logprobs, token_kl
from espl_jax.rl.losses import denominator, policy_gradient_loss
from espl_jax.rl.objective import Objective
from espl_jax.rl.routing import LOAD, load_metrics, routing_sums
from espl_jax.rl.tree import Arrays, Places, microbatches, rollout_level, shared_levels, sum_over_microbatches
from espl_jax.training.state import TrainState, whole_params
from espl_jax.types import TrainBatch


def place_batch(batch: TrainBatch, mesh: Mesh | None) -> TrainBatch:
    """Puts a batch on the mesh: system prompts replicated, problems and rollouts sharded."""
    shared = ("system_tokens", "system_lengths", "num_rollouts", "num_tokens")
    return TrainBatch(
        **{
            name: (sharding.replicate if name in shared else sharding.place_rows)(x, mesh)
            for name, x in batch._asdict().items()
        }
    )


def gradients(
    trainable: Params,
    frozen: Params | None,
    reference: Params | None,
    batch: TrainBatch,
    decoder: DecoderConfig,
    objective: Objective = Objective(),
    *,
    microbatch_rows: int = 0,
) -> tuple[Params, dict[str, jax.Array]]:
    """Returns the gradient of the objective: (loss sum + `kl_coef` * KL sum) / denominator of the loss.

    Args:
      trainable: adapters, or all params.
      frozen: the base of the adapters; None for full fine-tuning.
      reference: params of the reference policy; required if `objective.kl_coef` is not 0.
      batch: the prefix tree of the update.
      decoder: the model's configuration; `decoder.remat` selects which activations are recomputed.
      objective: the loss and the KL penalty.
      microbatch_rows: rows of each shard per microbatch, 0 for all. Must divide the rows of a shard.

    Returns:
      (gradients, metrics): gradients with the structure of `trainable`; the metric `loss`, and means over
      tokens of `entropy`, the metrics of `policy_gradient_loss`, `cut_disagreements` (with cut-offs: the
      fraction of tokens that the trainer would have cut), `kl` (if `kl_coef` is not 0) and, with experts, the
      metrics of `rl.routing`.

    Raises:
      ValueError: if `microbatch_rows` does not divide the rows of a shard, or a sample-based `kl_estimator`
        is used with truncated sampling.
    """
    rows = batch.inputs.shape[1]
    size = min(microbatch_rows or rows, rows)
    if rows % size:
        raise ValueError(
            f"microbatch_rows={size}: does not divide the {rows} rollouts of a shard; pad the batch to a "
            "multiple, as train_batches does"
        )
    kl_coef = objective.kl_coef
    if kl_coef and objective.kl_estimator != "exact" and batch.cutoffs is not None:
        raise ValueError(
            f"kl_estimator={objective.kl_estimator!r} requires untruncated sampling: disable top_p, top_k "
            "and min_p, or use kl_estimator='exact'"
        )

    def shared(trainable: Params) -> tuple[Arrays, Places]:
        return shared_levels(whole_params(trainable, frozen), batch, decoder)

    policy_arrays, pull_back, places = jax.vjp(shared, trainable, has_aux=True)
    reference_arrays = None
    if kl_coef:
        assert reference is not None
        reference_arrays, _ = shared_levels(reference, batch, decoder)
    loss = functools.partial(
        _microbatch_loss,
        frozen=frozen,
        reference=reference,
        reference_arrays=reference_arrays,
        places=places,
        batch=batch,
        decoder=decoder,
        objective=objective,
    )

    def of_microbatch(micro: dict[str, jax.Array]):
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(trainable, policy_arrays, micro)

    (grads, cotangents), metrics = sum_over_microbatches(of_microbatch, batch, size)
    (through_shared,) = pull_back(cotangents)
    tokens = jnp.maximum(metrics.pop("tokens"), 1.0)
    metrics = {name: x if name == "loss" else x / tokens for name, x in metrics.items()}
    if decoder.experts:
        metrics |= load_metrics(metrics.pop(LOAD), decoder.experts.active)
    return jax.tree.map(jnp.add, grads, through_shared), metrics


def _microbatch_loss(
    trainable: Params,
    arrays: Arrays,
    micro: dict[str, jax.Array],
    *,
    frozen: Params | None,
    reference: Params | None,
    reference_arrays: Arrays | None,
    places: Places,
    batch: TrainBatch,
    decoder: DecoderConfig,
    objective: Objective,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns a microbatch's share of the objective, and its metrics as sums over tokens.

    Args:
      trainable, frozen, reference, batch, decoder, objective: as for `gradients`.
      arrays, reference_arrays: keys and values of the shared levels, of the policy and the reference policy.
      micro: arrays of the microbatch's rollouts.
      places: `start` and `length` of the nodes of the shared levels.
    """
    loss, temperature = objective.loss, objective.temperature
    divisor = denominator(loss, batch.num_rollouts, batch.num_tokens)
    params, mask, cutoffs = whole_params(trainable, frozen), micro["mask"], micro.get("cutoffs")
    level = rollout_level(params, arrays, places, batch, micro, decoder, objective.replay_routing)
    hidden = level.hidden
    stats = target_logprobs(params, decoder, hidden, micro["targets"], temperature, cutoffs)
    old = micro.get("old_logprobs")
    if old is None and loss.needs_old_logprobs:
        old = stats.logprobs
    total, _, metrics = policy_gradient_loss(
        stats.logprobs,
        micro["sampler_logprobs"],
        micro["advantages"],
        mask,
        loss.kind,
        old_logprobs=old,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        sampler_weight_cap=loss.sampler_weight_cap,
    )
    metrics["entropy"] = jnp.where(mask, stats.entropy, 0.0).sum()
    if decoder.experts:
        assert level.routing is not None
        metrics |= routing_sums(level.routing, decoder.experts.count, mask, micro.get("routing"))
    if cutoffs is not None:
        metrics["cut_disagreements"] = (stats.cut & mask).sum().astype(jnp.float32)
    if objective.kl_coef:
        assert reference is not None and reference_arrays is not None
        other = rollout_level(reference, reference_arrays, places, batch, micro, decoder).hidden
        other = jax.lax.stop_gradient(other)
        if objective.kl_estimator == "exact":
            kl = token_kl(params, hidden, reference, other, decoder, temperature)
        else:
            theirs = target_logprobs(reference, decoder, other, micro["targets"], temperature).logprobs
            three = stats.logprobs, theirs, micro["sampler_logprobs"]
            ours, theirs, sampler = (jnp.where(mask, x, 0.0) for x in three)
            kl = kl_estimate(ours, theirs, objective.kl_estimator, sampler)
        metrics["kl"] = jnp.where(mask, kl, 0.0).sum()
        total = total + objective.kl_coef * metrics["kl"]
    return total / divisor, jax.lax.stop_gradient(metrics | {"loss": total / divisor})


@functools.partial(jax.jit, static_argnames=("decoder", "replay_routing", "microbatch_rows"))
def batch_logprobs(
    trainable: Params,
    frozen: Params | None,
    batch: TrainBatch,
    decoder: DecoderConfig,
    *,
    temperature: float = 1.0,
    replay_routing: bool = False,
    microbatch_rows: int = 0,
) -> jax.Array:
    """Returns the logprobs of a batch's targets before its first update, for `TrainBatch.old_logprobs`.

    Args:
      trainable, frozen, batch, decoder, microbatch_rows: as for `gradients`.
      temperature: divides the logits.
      replay_routing: as in `Objective`.

    Returns:
      float32 [D, R, T], under the sampling distribution (after truncation); 0 in microbatches with an empty
      mask.
    """
    shards, rows, steps = batch.inputs.shape
    size = min(microbatch_rows or rows, rows)
    params = whole_params(trainable, frozen)
    arrays, places = shared_levels(params, batch, decoder)

    def score(micro: dict[str, jax.Array]) -> jax.Array:
        hidden = rollout_level(params, arrays, places, batch, micro, decoder, replay_routing).hidden
        targets, cutoffs = micro["targets"], micro.get("cutoffs")
        return target_logprobs(params, decoder, hidden, targets, temperature, cutoffs).logprobs

    def score_or_skip(micro: dict[str, jax.Array]) -> jax.Array:
        empty = jnp.zeros(micro["targets"].shape, jnp.float32)
        return jax.lax.cond(micro["mask"].any(), score, lambda _: empty, micro)

    scored = jax.lax.map(score_or_skip, microbatches(batch, size))
    return jnp.moveaxis(scored.reshape(-1, shards, size, steps), 0, 1).reshape(shards, rows, steps)


@functools.partial(
    jax.jit,
    static_argnames=("decoder", "optimizer", "microbatch_rows"),
    donate_argnames="state",
)
def policy_gradient_step(
    state: TrainState,
    frozen: Params | None,
    reference: Params | None,
    batch: TrainBatch,
    decoder: DecoderConfig,
    optimizer: optax.GradientTransformation,
    objective: Objective = Objective(),
    *,
    microbatch_rows: int = 0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies one update. `state` is donated; see `gradients` for the other arguments.

    If the loss or the gradient norm is not finite, the update is skipped and the state returned unchanged.

    Returns:
      (state, metrics): the new state; the metrics of `gradients`, `grad_norm` before clipping, and `skipped`,
      1.0 if the update was skipped, else 0.0.
    """
    grads, metrics = gradients(
        state.trainable,
        frozen,
        reference,
        batch,
        decoder,
        objective,
        microbatch_rows=microbatch_rows,
    )
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = cast(Params, optax.apply_updates(state.trainable, updates))
    updated = TrainState(state.step + 1, trainable, opt_state)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    return state, metrics | {"grad_norm": norm, "skipped": 1.0 - finite}
