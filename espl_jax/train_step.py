"""The policy-gradient step over the prefix tree.

Rollouts go by in microbatches of rows. The two shared levels run forward once, every microbatch attends to
their caches, and they run backward once, over the sum of the microbatches' cotangents; so the gradient does
not depend on how rows are cut up.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from espl_jax import sharding
from espl_jax.models import lora
from espl_jax.models.attention import KVCache
from espl_jax.models.config import DecoderConfig
from espl_jax.models.transformer import Params, forward
from espl_jax.rl.logprobs import target_logprobs, token_kl
from espl_jax.rl.losses import policy_gradient_loss
from espl_jax.types import TrainBatch


@struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
      step: int32 [], updates made.
      trainable: all params (full fine-tuning), or the adapters alone.
      opt_state: of the optax chain.
    """

    step: jax.Array
    trainable: Params
    opt_state: Any


def init_train_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state before its first step."""
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable))


def abstract_train_state(
    trainable: Params, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> TrainState:
    """Shapes of a train state, with the shardings of its arrays where there is a mesh.

    Args:
      trainable: shapes of what is trained.
      optimizer: its averages lie where the weights do, its counters everywhere.
      mesh: of devices.
    """
    state = jax.eval_shape(functools.partial(init_train_state, optimizer=optimizer), trainable)
    everywhere = functools.partial(sharding.replicate, mesh=mesh)
    opt_state = optax.tree.map_params(
        optimizer, lambda _, like: like, state.opt_state, trainable, transform_non_params=everywhere
    )
    return TrainState(everywhere(state.step), trainable, opt_state)


def whole_params(trainable: Params, frozen: Params | None) -> Params:
    """The policy's params: adapters attached to their frozen base, or the trainable params themselves."""
    return trainable if frozen is None else lora.attach(frozen, trainable)


def gradients(
    trainable: Params,
    frozen: Params | None,
    reference: Params | None,
    batch: TrainBatch,
    config: DecoderConfig,
    *,
    temperature: float = 1.0,
    kl_coef: float = 0.0,
    loss: str = "importance_sampling",
    microbatch_rows: int = 0,
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient of the loss, 1/(N M B) times the sum over rollouts, plus `kl_coef` times the mean KL.

    Args:
      trainable: adapters, or all params.
      frozen: the base of the adapters; None for full fine-tuning.
      reference: params of the reference policy; needed when `kl_coef` is not 0.
      batch: the tree.
      config: the decoder; `config.remat` decides whether layers are recomputed.
      temperature: of sampling; logits are divided by it here too.
      kl_coef: weight of KL(policy || reference), summed over a rollout's tokens.
      loss: a kind of `policy_gradient_loss`.
      microbatch_rows: at most so many rollouts at a time; 0 for all at once. It has to divide a group, or be
        a whole number of groups that divides a prompt's problems, or of prompts that divides the prompts.

    Returns:
      (gradients like `trainable`, metrics: `loss`, and per token `entropy`, `ratio`, `log_ratio_abs`, with
      cut-offs `cut_disagreements`, the share of tokens that the trainer would have cut, and with a
      coefficient `kl`).
    """
    prompts, problems, group, _ = batch.inputs.shape
    rows = prompts * problems * group
    size = min(microbatch_rows or rows, rows)
    for nodes in (prompts * problems, prompts, 1):
        if size % (rows // nodes) and (rows // nodes) % size:
            raise ValueError(
                f"microbatch_rows={size} does not fit the tree of {prompts} prompts x {problems} problems x "
                f"{group} rollouts; give a divisor of {group}, or {group} times a divisor of {problems}"
            )

    levels = (batch.system_tokens, batch.problem_tokens.reshape(prompts * problems, -1))
    lengths = (batch.system_lengths, batch.problem_lengths.reshape(-1))

    def shared_caches(params: Params) -> tuple[Any, tuple[KVCache, ...]]:
        _, caches = forward(params, config, levels, lengths)
        return tuple((cache.key, cache.value) for cache in caches), caches

    policy_caches, pull_back, caches = jax.vjp(
        lambda t: shared_caches(whole_params(t, frozen)), trainable, has_aux=True
    )
    places = [(cache.start, cache.length) for cache in caches]
    reference_caches = shared_caches(reference)[0] if kl_coef else None

    def hidden_states(params: Params, arrays: Any, inputs: jax.Array, index: jax.Array) -> jax.Array:
        ancestors = []
        for (key, value), (start, length) in zip(arrays, places, strict=True):
            children = rows // start.shape[0]
            count = max(1, size // children)
            first = index * size // children
            part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=count)
            ancestors.append(KVCache(part(key, axis=2), part(value, axis=2), part(start), part(length)))
        return forward(params, config, inputs, ancestors=ancestors)[0]

    def microbatch_loss(trainable: Params, arrays: Any, micro: dict[str, jax.Array], index: jax.Array):
        params = whole_params(trainable, frozen)
        hidden = hidden_states(params, arrays, micro["inputs"], index)
        stats = target_logprobs(params, config, hidden, micro["targets"], temperature, micro.get("cutoffs"))
        mask = micro["mask"]
        total, _, metrics = policy_gradient_loss(
            stats.logprobs, micro["sampler_logprobs"], micro["advantages"], mask, loss
        )
        metrics["entropy"] = jnp.where(mask, stats.entropy, 0.0).sum()
        if "cutoffs" in micro:
            metrics["cut_disagreements"] = (stats.cut & mask).sum().astype(jnp.float32)
        if kl_coef:
            hidden_ref = hidden_states(reference, reference_caches, micro["inputs"], index)
            kl = token_kl(params, hidden, reference, jax.lax.stop_gradient(hidden_ref), config, temperature)
            metrics["kl"] = jnp.where(mask, kl, 0.0).sum()
            total = total + kl_coef * metrics["kl"]
        return total / batch.num_rollouts, jax.lax.stop_gradient(
            metrics | {"loss": total / batch.num_rollouts}
        )

    def add_microbatch(carry, xs):
        micro, index = xs
        grads, metrics = jax.grad(microbatch_loss, argnums=(0, 1), has_aux=True)(
            trainable, policy_caches, micro, index
        )
        return jax.tree.map(jnp.add, carry, (grads, metrics)), None

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(rows // size, size, *x.shape[3:])

    names = ("inputs", "targets", "mask", "sampler_logprobs", "cutoffs", "advantages")
    arrays = {name: getattr(batch, name) for name in names}
    micros = {name: cut(x) for name, x in arrays.items() if x is not None}
    first = jax.tree.map(lambda x: x[0], micros)
    zeros = jax.tree.map(
        jnp.zeros_like,
        jax.eval_shape(
            lambda *x: jax.grad(microbatch_loss, argnums=(0, 1), has_aux=True)(*x),
            trainable,
            policy_caches,
            first,
            jnp.int32(0),
        ),
    )
    (totals, metrics), _ = jax.lax.scan(add_microbatch, zeros, (micros, jnp.arange(rows // size)))
    grads, cotangents = totals
    (through_shared,) = pull_back(cotangents)
    tokens = jnp.maximum(metrics.pop("tokens"), 1.0)
    metrics = {name: x if name == "loss" else x / tokens for name, x in metrics.items()}
    return jax.tree.map(jnp.add, grads, through_shared), metrics


@functools.partial(
    jax.jit,
    static_argnames=("config", "optimizer", "kl_coef", "loss", "microbatch_rows"),
    donate_argnames="state",
)
def policy_gradient_step(
    state: TrainState,
    frozen: Params | None,
    reference: Params | None,
    batch: TrainBatch,
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
    *,
    temperature: float = 1.0,
    kl_coef: float = 0.0,
    loss: str = "importance_sampling",
    microbatch_rows: int = 0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One on-policy update. `state` is donated; see `gradients` for the other arguments.

    Returns:
      (state, metrics): those of `gradients`, and `grad_norm` before clipping.
    """
    grads, metrics = gradients(
        state.trainable,
        frozen,
        reference,
        batch,
        config,
        temperature=temperature,
        kl_coef=kl_coef,
        loss=loss,
        microbatch_rows=microbatch_rows,
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    metrics["grad_norm"] = optax.global_norm(grads)
    return TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state), metrics
