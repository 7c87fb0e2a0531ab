"""espl_jax: evolving a language model's system prompt together with its weights, in JAX.

The names below are the public API. Each is imported on first use, so that code which only handles prompts,
ratings and problems does not import jax.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    # Array functions.
    "load_pretrained": "espl_jax.pretrained.load",
    "save_pretrained": "espl_jax.pretrained.save",
    "forward": "espl_jax.models.transformer",
    "logits": "espl_jax.models.transformer",
    "generate": "espl_jax.sampling.generate",
    "token_logprobs": "espl_jax.rl.logprobs",
    "advantages": "espl_jax.rl.advantages",
    "policy_gradient_loss": "espl_jax.rl.losses",
    # Prompts, ratings and text; none of these imports jax.
    "Problem": "espl_jax.types",
    "SystemPrompt": "espl_jax.types",
    "Rollouts": "espl_jax.types",
    "TrainBatch": "espl_jax.types",
    "Population": "espl_jax.evolution.population",
    "select": "espl_jax.evolution.selection",
    "rate": "espl_jax.evolution.ratings",
    "parse_edits": "espl_jax.evolution.edit_replies",
    "apply_edits": "espl_jax.evolution.edits",
    "mutate": "espl_jax.evolution.mutation",
    "crossover": "espl_jax.evolution.crossover",
    # Both.
    "collect_rollouts": "espl_jax.rollouts.collect",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(
            f"module 'espl_jax' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}"
        )
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
