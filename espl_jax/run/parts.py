"""From a configuration to the parts of a run: model, problems, environment, optimizer."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import optax

from espl_jax.data.problems import ProblemSet
from espl_jax.environments.base import Dialogue, Environment
from espl_jax.evolution.guards import Guards
from espl_jax.evolution.templates import load_template, template_names
from espl_jax.parallel import processes, sharding
from espl_jax.parallel.memory import bytes_per_device
from espl_jax.pretrained.load import Pretrained
from espl_jax.rl.losses import Loss
from espl_jax.rollouts.encode import longest_conversation, longest_problem
from espl_jax.run import inputs
from espl_jax.run.context import context_of, fitting, least_budget
from espl_jax.run.samplings import Lengths, Sampling, samplings
from espl_jax.run.tasks import environment_of, load_splits
from espl_jax.run.weights import abstract_trainable, declared_trainable, load_reference, trains
from espl_jax.sampling.layout import for_sampling
from espl_jax.sampling.sizes import Sizes
from espl_jax.sampling.truncation import Truncation
from espl_jax.text.chat import encode, encode_conversation
from espl_jax.training.optimizer import make_optimizer
from espl_jax.training.state import TrainState, abstract_train_state, sampling_params
from espl_jax.types import TrainBatch


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of and never changes.

    Attributes:
      reference: the model as loaded; its params are the reference policy and, with LoRA, the frozen base.
      splits: `train`, `validation`, and `test` if there is one.
      environment: words the user turns and grades.
      optimizer: the optax chain.
      mesh: of devices, or None on one.
      trains, evolves: which branches the mode has.
      lora: whether adapters are trained, and not all params.
      declared: of what is trained.
      sampling: keyword arguments that every sampling of the run shares, reflection included.
      rollouts: those that training and evaluation add.
      evolution: keyword arguments of `evolve`.
      loss: keyword arguments of `policy_gradient_step`.
      inputs: fingerprints of what was read.
      left_out: ids of the problems that are too long for the context, by split.
    """

    reference: Pretrained
    splits: dict[str, ProblemSet]
    environment: Environment | Dialogue
    optimizer: optax.GradientTransformation
    mesh: jax.sharding.Mesh | None
    trains: bool
    evolves: bool
    lora: bool
    declared: Any
    sampling: dict[str, Any]
    rollouts: dict[str, Any]
    evolution: dict[str, Any]
    loss: dict[str, Any]
    inputs: inputs.Fingerprints
    left_out: dict[str, tuple[str, ...]]

    @property
    def frozen(self) -> Any:
        """The base of the adapters, or None in full fine-tuning."""
        return self.reference.params if self.lora else None

    def policy(self, state: TrainState | None) -> Pretrained:
        """The model with the weights of a train state; the reference where nothing is trained."""
        if state is None:
            return self.reference
        params = sampling_params(
            state.trainable, self.frozen, self.declared, self.reference.config, self.mesh
        )
        return dataclasses.replace(self.reference, params=params)

    def step_arguments(self, state: TrainState, batch: TrainBatch) -> tuple[Any, ...]:
        """What `policy_gradient_step` is called with, beside `loss`."""
        reference = self.reference.params if self.loss["kl_coef"] else None
        return state, self.frozen, reference, batch, self.reference.config, self.optimizer


def assemble(config: Any) -> Parts:
    """Loads and builds everything. Raises as the parts do; `check_config` has been called before."""
    c = config
    mesh = sharding.make_mesh(dict(c.mesh))
    splits = processes.decide(lambda: load_splits(c))
    environment = environment_of(c)
    model = load_reference(c, mesh)
    read = processes.decide(lambda: inputs.fingerprints(c, splits, model.files))
    splits, left_out = fitting(c, splits, model, environment)
    parts = Parts(
        reference=model,
        splits=splits,
        environment=environment,
        optimizer=make_optimizer_of(c),
        mesh=mesh,
        trains=trains(c),
        evolves=c.mode != "rl",
        lora=bool(c.lora.rank),
        declared=declared_trainable(c, model.config),
        sampling={
            "chat_template_kwargs": json.loads(c.model.chat_template_kwargs),
            "max_rows": c.sampling.max_rows or None,
            "mesh": mesh,
        },
        rollouts={
            "truncation": Truncation(c.sampling.top_k, c.sampling.top_p, c.sampling.min_p),
            "stop_strings": tuple(c.sampling.stop_strings),
            "context_limit": c.sampling.context_limit or None,
            "show_thinking": c.environment.show_thinking,
            "tool_format": c.environment.tool_format,
        },
        evolution={
            "form": c.evolution.form,
            "guards": None,  # below: they need to know the longest problem
            "opening": c.reflection.opening,
            "mutation_sigma": c.evolution.mutation_sigma,
            "crossover_sigma": c.evolution.crossover_sigma,
            "crossover_prob": 0.0 if c.mode == "reflection" else c.evolution.crossover_prob,
            "tie_margin": c.ratings.tie_margin,
        },
        loss=loss_settings(c),
        inputs=read,
        left_out=left_out,
    )
    parts.sampling["held_bytes"] = held_while_sampling(c, parts)
    problems = [problem for split in splits.values() for problem in split.problems]
    parts.rollouts["longest_problem"] = longest_problem(
        model.tokenizer, problems, environment, parts.sampling["chat_template_kwargs"]
    )
    parts.evolution["guards"] = guards(c, parts)
    return parts


def loss_settings(c: Any) -> dict[str, Any]:
    """Keyword arguments of `policy_gradient_step`."""
    names = ("kind", "clip_low", "clip_high", "aggregation", "sampler_weight_cap")
    loss = Loss(**{name: c.loss[name] for name in names}, constant_length=c.sampling.max_new_tokens)
    return {
        "temperature": c.sampling.temperature,
        "loss": loss,
        **{name: c.loss[name] for name in ("kl_coef", "kl_estimator", "microbatch_rows")},
    }


def make_optimizer_of(config: Any) -> optax.GradientTransformation:
    """The optax chain; schedules end with the last update that the run can take."""
    fields = {name: value for name, value in config.optimizer.items() if name != "max_skipped"}
    updates = config.num_iterations * config.loss.epochs * config.loss.minibatches
    return make_optimizer(**fields, decay_steps=updates)


def guards(config: Any, parts: Parts) -> Guards:
    """What evolution accepts; prompts and problems are measured in tokens of the model.

    A prompt leaves room in the context for the longest problem and a whole rollout, or where these fill it
    themselves, takes a quarter of it at most.
    """
    model, environment = parts.reference, parts.environment
    context = context_of(config, model.config)
    problems = [problem for split in parts.splits.values() for problem in split.problems]
    kwargs = parts.sampling["chat_template_kwargs"]
    longest = longest_conversation(model.tokenizer, problems, environment, kwargs)
    room = context - max(parts.rollouts["longest_problem"] + config.sampling.max_new_tokens, longest + 1)
    names = ("max_edits", "max_words", "word_retries", "max_principles", "copied_tokens", "copied_answers")
    return Guards(
        **{name: config.evolution[name] for name in names},
        max_prompt_tokens=max(min(config.evolution.max_prompt_tokens, room), least_budget(config, context)),
        max_reply_tokens=config.reflection.max_new_tokens,
        tokenize=functools.partial(encode, model.tokenizer),
        problems=parts.splits["train"].problems,
    )


def rollout_sizes(config: Any, parts: Parts) -> tuple[Sizes, ...]:
    """What the rollouts of a training iteration reserve and compile for, whatever its problems."""
    longest = Lengths(0, parts.rollouts["longest_problem"], config.sampling.max_new_tokens)
    rollouts = samplings_of(config, parts, longest)[0]
    return rollouts.sizes(parts.reference.config, parts.sampling["held_bytes"], parts.mesh)


def samplings_of(config: Any, parts: Parts, lengths: Lengths) -> list[Sampling]:
    """All kinds of sampling of the run; its rollouts are as long as `lengths` say."""
    model, kwargs = parts.reference, parts.sampling["chat_template_kwargs"]

    def instructions(name: str) -> int:
        turns = (("system", load_template(name).system), ("user", "-"))
        messages = [{"role": role, "content": content} for role, content in turns]
        return len(encode_conversation(model.tokenizer, messages, **kwargs)[0])

    return samplings(
        config,
        model.config,
        lengths,
        longest_problem=max(parts.rollouts["longest_problem"], lengths.problem),
        turns=hasattr(parts.environment, "respond"),
        evaluated={name: len(split) for name, split in parts.splits.items() if name != "train"},
        instructions=max(map(instructions, template_names())),
    )


def held_while_sampling(config: Any, parts: Parts) -> int:
    """Bytes of each device that are taken while a run samples: weights, the optimizer's state, and what of
    the policy is laid out anew for sampling."""
    state = abstract_run_state(config, parts)
    held = {id(x) for x in jax.tree.leaves((parts.reference.params, state))}
    params, _ = for_sampling(parts.policy(state).params, parts.reference.config, parts.mesh)
    copies = [x for x in jax.tree.leaves(params) if id(x) not in held]
    return bytes_per_device((parts.reference.params, state, copies))


def abstract_run_state(config: Any, parts: Parts) -> TrainState | None:
    """Shapes of the train state, or None where nothing is trained; see `abstract_train_state`."""
    if not parts.trains:
        return None
    trainable = abstract_trainable(config, parts.reference.config, parts.mesh)
    return abstract_train_state(trainable, parts.optimizer, parts.mesh)
