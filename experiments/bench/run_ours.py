"""Times `espl_jax.generate`; see measure.py. It also returns the logprobs of what it draws."""

from __future__ import annotations

import jax
from measure import read_request, report

import espl_jax

request = read_request()
model = espl_jax.load_pretrained(request.model, **request.settings)


def sample(seed: int) -> int:
    """One call of the workload."""
    samples = espl_jax.generate(
        model.params,
        model.config,
        request.prompts,
        key=jax.random.key(seed),
        group_size=request.group_size,
        max_new_tokens=request.max_new_tokens,
    )
    return int(samples.lengths.sum())


def greedy(prompts: list[list[int]], count: int) -> list[list[int]]:
    """The most likely continuation of each prompt."""
    samples = espl_jax.generate(
        model.params,
        model.config,
        prompts,
        key=jax.random.key(0),
        group_size=1,
        max_new_tokens=count,
        temperature=0.0,
    )
    return samples.tokens[:, 0].tolist()


report(request, sample, greedy, ("jax", "jaxlib"))
