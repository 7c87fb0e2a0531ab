"""Times `policy_gradient_step` over the prefix tree; see measure.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from measure import LEARNING_RATE, Request, read_request, report_training

import espl_jax
from espl_jax.models import lora
from espl_jax.text.chat import common_length
from espl_jax.training.batches import train_batches
from espl_jax.training.optimizer import make_optimizer
from espl_jax.training.state import init_train_state
from espl_jax.training.step import policy_gradient_step
from espl_jax.types import Rollouts, TrainBatch


def batch_of(request: Request, microbatch_rows: int) -> TrainBatch:
    """The batch that an iteration of these rollouts trains on."""
    shared = [min(common_length(lane[0], prompt) for prompt in lane) for lane in request.prompts]
    lanes = list(zip(request.prompts, shared, strict=True))
    tokens = np.array(request.completions, np.int32)
    advantages = np.array(request.advantages, np.float32)
    every = np.ones(tokens.shape, bool)
    logprobs = np.array(request.sampler_logprobs, np.float32)
    rollouts = Rollouts(
        prompts=(),
        problems=(),
        system_tokens=tuple(tuple(lane[0][:size]) for lane, size in lanes),
        problem_tokens=tuple(tuple(tuple(prompt[size:]) for prompt in lane) for lane, size in lanes),
        tokens=tokens,
        lengths=every.sum(axis=-1),
        drawn=every,
        logprobs=logprobs,
        untruncated_logprobs=logprobs,
        cutoffs=np.full(tokens.shape, -np.inf, np.float32),
        temperature=1.0,
        truncated=np.ones(advantages.shape, bool),
        replies=(),
        answers=(),
        rewards=advantages,
        success=np.zeros(advantages.shape, bool),
    )
    (batch,) = train_batches(rollouts, advantages, microbatch_rows=microbatch_rows)
    return batch


request = read_request()
settings = dict(request.settings)
trained, microbatch_rows = settings.pop("trained"), settings.pop("microbatch_rows")
optimizer = make_optimizer(LEARNING_RATE)
if trained == "adapters":
    model = espl_jax.load_pretrained(request.adapter, **settings)
    frozen, trainable = lora.detach(model.params)
else:
    model = espl_jax.load_pretrained(request.model, **settings)
    frozen, trainable = None, jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
batch = batch_of(request, microbatch_rows)
state = init_train_state(trainable, optimizer)
del trainable  # the first step takes its memory over


def step() -> tuple[float, float]:
    """One update."""
    global state
    state, metrics = policy_gradient_step(
        state, frozen, None, batch, model.config, optimizer, microbatch_rows=microbatch_rows
    )
    jax.block_until_ready(state)
    return metrics["loss"], metrics["grad_norm"]


report_training(request, step, ("jax", "jaxlib"))
