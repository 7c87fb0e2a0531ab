"""Our losses, KL estimates and their gradients against those of TRL's GRPOTrainer, called as it is.

The trainer is made without its constructor, with what its loss reads and nothing else. The policy's logprobs,
which it would get from a model, are a tensor of which we take the gradient.
"""

import collections
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("trl")
torch = pytest.importorskip("torch")
from trl import GRPOTrainer  # noqa: E402

from espl_jax.rl.kl import kl_estimate  # noqa: E402
from espl_jax.rl.losses import Loss, denominator, policy_gradient_loss  # noqa: E402

ROWS, LENGTH, MAX_LENGTH = 6, 9, 16
CAP = 1.3

# Of the loss, and of the gradients over the largest one; found among 20 seeds were 9.5e-7 and 2.0e-7.
TOLERANCE = 5e-6


class Accelerator:
    """A fake accelerator with one process, for which reductions and gathers are the identity."""

    num_processes = 1

    def reduce(self, x, reduction):
        return x

    def gather(self, x):
        return x


def batch(seed):
    """Float32 arrays whose ratios lie on both sides of every range; each row has a token, as TRL needs."""
    rng = np.random.default_rng(seed)
    mask = rng.random((ROWS, LENGTH)) < 0.7
    mask[:, 0] = True
    sampler = -rng.exponential(size=mask.shape)
    old = sampler + rng.normal(0, 0.3, mask.shape)
    logprobs = old + rng.normal(0, 0.5, mask.shape)
    reference = logprobs + rng.normal(0, 0.5, mask.shape)
    arrays = {"logprobs": logprobs, "sampler": sampler, "old": old, "reference": reference}
    arrays["advantages"] = rng.normal(size=ROWS)
    return {name: x.astype(np.float32) for name, x in arrays.items()} | {"mask": mask}


def trl_loss(arrays, *, loss_type, level="token", low=0.2, high=0.2, weights=None, beta=0.0):
    """TRL's loss, its gradient by the logprobs, and the share of tokens (or rollouts) that it clips."""
    logprobs = torch.tensor(arrays["logprobs"], requires_grad=True)
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    read = {
        "model": SimpleNamespace(training=True),
        "accelerator": Accelerator(),
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "_metrics": {"train": collections.defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        "_entropy_bonus_enabled": False,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "epsilon_low": low,
        "epsilon_high": high,
        "beta": beta,
        "use_vllm": weights is not None,
        "vllm_importance_sampling_correction": True,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_LENGTH,
    }
    for name, value in read.items():
        setattr(trainer, name, value)
    mask = torch.tensor(arrays["mask"]).int()
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.int),
        "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.tensor(arrays["advantages"]),
        "old_per_token_logps": torch.tensor(arrays["old"]),
        "ref_per_token_logps": torch.tensor(arrays["reference"]),
        "importance_sampling_ratio": None if weights is None else torch.tensor(weights),
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    clipped = trainer._metrics["train"].get("clip_ratio/region_mean", [None])[0]
    return loss.item(), logprobs.grad.numpy(), clipped


def our_loss(arrays, loss, beta=0.0):
    """Returns the same from our losses, with the KL penalty added as TRL does."""
    mask = jnp.asarray(arrays["mask"])

    def value(logprobs):
        total, rollouts, metrics = policy_gradient_loss(
            logprobs,
            arrays["sampler"],
            arrays["advantages"],
            mask,
            loss.kind,
            old_logprobs=arrays["old"],
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            sampler_weight_cap=loss.sampler_weight_cap,
        )
        if beta:
            kl = kl_estimate(logprobs, arrays["reference"], "k3")
            total = total + beta * jnp.where(mask, kl, 0.0).sum()
        tokens = metrics["tokens"]
        return total / denominator(loss, rollouts, tokens), metrics["clip_fraction"] / tokens

    (total, clipped), grads = jax.value_and_grad(value, has_aux=True)(jnp.asarray(arrays["logprobs"]))
    return float(total), np.asarray(grads), float(clipped)


def constant(kind, **fields):
    return Loss(kind, aggregation="constant_length", constant_length=MAX_LENGTH, **fields)


PAIRS = {
    "ppo, token mean, DAPO's range": (
        Loss("ppo", clip_high=0.28, aggregation="token_mean"),
        {"loss_type": "dapo", "high": 0.28},
    ),
    "ppo, constant length": (constant("ppo"), {"loss_type": "dr_grpo"}),
    "ppo, rollouts' mean": (Loss("ppo"), {"loss_type": "luspo"}),
    "ppo with k3": (Loss("ppo", aggregation="token_mean"), {"loss_type": "dapo", "beta": 0.3}),
    # TRL bounds the ratio of CISPO itself, and from above alone.
    "cispo": (Loss("cispo", aggregation="token_mean"), {"loss_type": "cispo", "high": 4.0}),
    "cispo, narrow": (
        Loss("cispo", clip_high=0.2, aggregation="token_mean"),
        {"loss_type": "cispo", "high": 1.2},
    ),
    # TRL's rollout has a term a token, all the same, and takes their mean.
    "gspo": (Loss("gspo"), {"loss_type": "grpo", "level": "sequence", "low": 3e-4, "high": 4e-4}),
    "gspo, wide": (
        Loss("gspo", clip_low=0.2, clip_high=0.2),
        {"loss_type": "grpo", "level": "sequence"},
    ),
}


def sampler_weights(arrays, level):
    """Truncated weights, which TRL computes while sampling: of each token, or of each rollout."""
    log_weights = np.where(arrays["mask"], arrays["old"] - arrays["sampler"], 0.0)
    if level == "sequence":
        log_weights = log_weights.sum(axis=1, keepdims=True) / arrays["mask"].sum(axis=1, keepdims=True)
    return np.minimum(np.exp(log_weights), CAP).astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "sampler weights"])
@pytest.mark.parametrize("pair", PAIRS)
def test_as_trl(pair, weighted):
    loss, options = PAIRS[pair]
    level = options.get("level", "token")
    zeros = []
    for seed in range(5):
        arrays = batch(seed)
        weights = sampler_weights(arrays, level) if weighted else None
        ours = our_loss(
            arrays,
            dataclasses.replace(loss, sampler_weight_cap=CAP if weighted else 0.0),
            options.get("beta", 0.0),
        )
        theirs = trl_loss(arrays, weights=weights, **options)
        assert ours[0] == pytest.approx(theirs[0], abs=TOLERANCE)
        np.testing.assert_allclose(ours[1], theirs[1], atol=TOLERANCE * np.abs(theirs[1]).max(), rtol=0)
        if loss.kind == "ppo":
            assert ours[2] == pytest.approx(theirs[2], rel=1e-6)
        zeros.append((theirs[1][arrays["mask"]] == 0).mean())
    if loss.kind != "cispo" and "beta" not in options:
        assert 0.1 < np.mean(zeros) < 0.6  # both sides of the range are met
