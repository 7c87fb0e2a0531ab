"""Functions of the package with flat keyword arguments, so that a test can change one setting in a dict."""

import dataclasses

import jax

from espl_jax.rl.objective import Objective
from espl_jax.rollouts import collect
from espl_jax.sampling import generate
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.text.chat_format import ChatFormat
from espl_jax.training import step


def take(cls, settings):
    """Pops the settings that are fields of a dataclass, and constructs it from them."""
    names = {field.name for field in dataclasses.fields(cls)} & settings.keys()
    return cls(**{name: settings.pop(name) for name in names})


def _sampling(settings):
    if settings.get("stop_ids") is not None:
        settings["stop_ids"] = tuple(settings["stop_ids"])
    return take(Sampling, settings)


def sample_tree(*args, **settings):
    """`sampling.generate.sample_tree`."""
    return generate.sample_tree(*args, _sampling(settings), take(Capacity, settings), **settings)


def collect_rollouts(*args, **settings):
    """`rollouts.collect.collect_rollouts`."""
    settings["template_arguments"] = settings.pop("chat_template_kwargs", {})
    given = {"sampling": _sampling(settings), "capacity": take(Capacity, settings)}
    return collect.collect_rollouts(*args, **given, chat=take(ChatFormat, settings), **settings)


def gradients(trainable, frozen, reference, batch, decoder, **settings):
    """`training.step.gradients`."""
    objective = take(Objective, settings)
    return step.gradients(trainable, frozen, reference, batch, decoder, objective, **settings)


compiled_gradients = jax.jit(
    gradients,
    static_argnames=("decoder", "loss", "kl_coef", "kl_estimator", "replay_routing", "microbatch_rows"),
)


def policy_gradient_step(state, frozen, reference, batch, decoder, optimizer, **settings):
    """`training.step.policy_gradient_step`."""
    objective = take(Objective, settings)
    return step.policy_gradient_step(
        state, frozen, reference, batch, decoder, optimizer, objective, **settings
    )
