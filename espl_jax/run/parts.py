"""Builds the parts of a run from its configuration: model, problems, environment, optimizer."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import optax

from espl_jax.data.problems import ProblemSet
from espl_jax.environments.base import Dialogue, Environment, is_dialogue
from espl_jax.evolution.guards import Guards
from espl_jax.evolution.settings import Evolution, Reflection
from espl_jax.evolution.templates import Templates, template_names
from espl_jax.models.config import DecoderConfig
from espl_jax.parallel import processes, sharding
from espl_jax.parallel.ahead import abstract
from espl_jax.parallel.memory import bytes_per_device
from espl_jax.pretrained.load import Pretrained
from espl_jax.rl.losses import Loss
from espl_jax.rl.objective import Objective
from espl_jax.rollouts.encode import longest_conversation, longest_problem
from espl_jax.run import inputs
from espl_jax.run.check_groups import trains
from espl_jax.run.config import Config
from espl_jax.run.context import context_of, fitting, least_budget
from espl_jax.run.tasks import environment_of, load_splits
from espl_jax.run.weights import abstract_trainable, declared_trainable, load_reference, load_reflector
from espl_jax.run.workloads import Lengths, Workload, workloads
from espl_jax.sampling.layout import for_sampling
from espl_jax.sampling.programs import Shapes
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.sampling.truncation import Truncation
from espl_jax.text.chat import encode, encode_conversation
from espl_jax.text.chat_format import ChatFormat
from espl_jax.training.optimizer import make_optimizer
from espl_jax.training.state import TrainState, abstract_train_state, sampling_params
from espl_jax.types import TrainBatch


@dataclasses.dataclass(frozen=True)
class Parts:
    """Immutable parts of a run.

    Attributes:
      reference: the model as loaded; its params are the reference policy and, with LoRA, the frozen base.
      splits: `train`, `validation`, and `test` if there is one.
      environment: writes the user turns and grades the replies.
      optimizer: the optax chain.
      mesh: the device mesh, or None on a single device.
      trains, evolves: whether the mode trains weights, and whether it evolves prompts.
      lora: whether adapters are trained instead of all params.
      declared: declarations of the trained params.
      chat: chat format of conversations.
      sampling: sampling settings of rollouts.
      capacity: memory and mesh available to rollouts.
      evolution: settings of the evolution of prompts.
      reflector: the model of `reflection.source`, or None.
      objective: the training objective.
      inputs: fingerprints of the inputs.
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
    chat: ChatFormat
    sampling: Sampling
    capacity: Capacity
    evolution: Evolution
    reflector: Pretrained | None
    objective: Objective
    inputs: inputs.Fingerprints
    left_out: dict[str, tuple[str, ...]]

    @property
    def frozen(self) -> Any:
        """Frozen base params of the adapters, or None in full fine-tuning."""
        return self.reference.params if self.lora else None

    def policy(self, state: TrainState | None) -> Pretrained:
        """Returns the model with the weights of a train state; the reference model if nothing is trained."""
        return _policy(self.reference, state, self.declared, self.lora, self.mesh)

    def step_arguments(self, state: TrainState, batch: TrainBatch) -> tuple[Any, ...]:
        """Returns the arguments of `policy_gradient_step`, except for `microbatch_rows`."""
        reference = self.reference.params if self.objective.kl_coef else None
        return state, self.frozen, reference, batch, self.reference.config, self.optimizer, self.objective


def _policy(
    reference: Pretrained, state: TrainState | None, declared: Any, lora: bool, mesh: jax.sharding.Mesh | None
) -> Pretrained:
    if state is None:
        return reference
    frozen = reference.params if lora else None
    params = sampling_params(state.trainable, frozen, declared, reference.config, mesh)
    return dataclasses.replace(reference, params=params)


def assemble(config: Config) -> Parts:
    """Loads and builds all parts of a run. `config` must have passed `check_config`."""
    mesh = sharding.make_mesh(dict(config.mesh))
    splits = processes.decide(lambda: load_splits(config))
    environment = environment_of(config)
    model = load_reference(config, mesh)
    reflector = load_reflector(config, mesh)
    read = processes.decide(
        lambda: inputs.fingerprints(config, splits, model.files, reflector and reflector.files)
    )
    splits, left_out = fitting(config, splits, model, environment)
    problems = [problem for split in splits.values() for problem in split.problems]
    chat, optimizer = chat_format(config), make_optimizer_of(config)
    declared = declared_trainable(config, model.config)
    state = abstract_run_state(config, model.config, optimizer, mesh)
    capacity = Capacity(
        max_rows=config.sampling.max_rows or None,
        held_bytes=held_while_sampling(model, state, declared, bool(config.lora.rank), mesh)
        + bytes_per_device(reflector and reflector.params),
        longest_problem=longest_problem(model.tokenizer, problems, environment, chat.template_arguments),
        mesh=mesh,
    )
    return Parts(
        reference=model,
        splits=splits,
        environment=environment,
        optimizer=optimizer,
        mesh=mesh,
        trains=trains(config),
        evolves=config.mode != "rl",
        lora=bool(config.lora.rank),
        declared=declared,
        chat=chat,
        sampling=sampling_of(config),
        capacity=capacity,
        evolution=evolution_of(
            config, guards(config, model, environment, splits, chat, capacity.longest_problem)
        ),
        reflector=reflector,
        objective=objective_of(config),
        inputs=read,
        left_out=left_out,
    )


def chat_format(config: Config) -> ChatFormat:
    """Returns the chat format of a run."""
    return ChatFormat(
        template_arguments=json.loads(config.model.chat_template_kwargs),
        show_thinking=config.environment.show_thinking,
        tool_format=config.environment.tool_format,
        stop_strings=tuple(config.sampling.stop_strings),
    )


def sampling_of(config: Config) -> Sampling:
    """Returns the sampling settings of training rollouts."""
    return Sampling(
        max_new_tokens=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature,
        truncation=Truncation(config.sampling.top_k, config.sampling.top_p, config.sampling.min_p),
        context_limit=config.sampling.context_limit or None,
        draft_tokens=config.sampling.draft_tokens,
    )


def evolution_of(config: Config, guards: Guards) -> Evolution:
    """Returns the evolution settings of a run."""
    return Evolution(
        form=config.evolution.form,
        guards=guards,
        reflection=reflection_of(config),
        crossover_prob=0.0 if config.mode == "reflection" else config.evolution.crossover_prob,
        crossover_sigma=config.evolution.crossover_sigma,
        mutation_sigma=config.evolution.mutation_sigma,
        tie_margin=config.ratings.tie_margin,
    )


def reflection_of(config: Config) -> Reflection:
    """What the reflector of a run is shown and asked."""
    r = config.reflection
    names = ("problems", "max_problems", "max_attempts", "verbatim_chars", "rejected_edits", "stages")
    names += ("reasoning", "opening", "constrained")
    by_reflector = "lines" if r.reflector == "local" else "json"
    return Reflection(
        **{name: r[name] for name in names},
        show=tuple(r.show),
        output=config.evolution.output,
        format=by_reflector if r.format == "auto" else r.format,
        templates=Templates(r.templates),
    )


def objective_of(config: Config) -> Objective:
    """Returns the training objective of a run."""
    names = ("kind", "clip_low", "clip_high", "aggregation", "sampler_weight_cap")
    fields = {name: config.loss[name] for name in names}
    return Objective(
        loss=Loss(**fields, constant_length=config.sampling.max_new_tokens),
        temperature=config.sampling.temperature,
        kl_coef=config.loss.kl_coef,
        kl_estimator=config.loss.kl_estimator,
        replay_routing=config.loss.sampler_routing == "replay",
    )


def make_optimizer_of(config: Config) -> optax.GradientTransformation:
    """Returns the optax chain; schedules end at the last update that the run can take."""
    fields = {name: value for name, value in config.optimizer.items() if name != "max_skipped"}
    updates = config.num_iterations * config.loss.epochs * config.loss.minibatches
    return make_optimizer(**fields, decay_steps=updates)


def guards(
    config: Config,
    model: Pretrained,
    environment: Environment | Dialogue,
    splits: dict[str, ProblemSet],
    chat: ChatFormat,
    longest_problem: int,
) -> Guards:
    """Returns the limits on evolved prompts, in tokens of the model.

    A prompt leaves room in the context for the longest problem and a full rollout. If these leave less than a
    quarter of the context, the prompt may still use that quarter.
    """
    context = context_of(config, model.config)
    problems = [problem for split in splits.values() for problem in split.problems]
    longest = longest_conversation(model.tokenizer, problems, environment, chat.template_arguments)
    room = context - max(longest_problem + config.sampling.max_new_tokens, longest + 1)
    names = ("max_edits", "max_words", "word_retries", "max_principles")
    names += ("copied_tokens", "copied_answers", "copied_templates", "copied_members")
    return Guards(
        **{name: config.evolution[name] for name in names},
        max_prompt_tokens=max(min(config.evolution.max_prompt_tokens, room), least_budget(config, context)),
        tokenize=functools.partial(encode, model.tokenizer),
        problems=splits["train"].problems,
    )


def rollout_shapes(config: Config, parts: Parts) -> Shapes:
    """Returns what the programs of training rollouts depend on. Their sizes do not depend on the batch; the
    params and the columns of the system prompts are placeholders."""
    longest = Lengths(0, parts.capacity.longest_problem, config.sampling.max_new_tokens)
    rollouts = workloads_of(config, parts, longest)[0]
    held, model = parts.capacity.held_bytes, parts.reference
    assert held is not None
    stages = rollouts.sizes(model.config, held, parts.mesh)
    return rollouts.shapes(model.config, abstract(model.params), stages, parts.mesh)


def workloads_of(config: Config, parts: Parts, lengths: Lengths) -> list[Workload]:
    """Returns all sampling workloads of the run, with rollouts of the given lengths."""
    model, arguments = parts.reference, parts.chat.template_arguments
    templates = parts.evolution.reflection.templates

    def instructions(name: str) -> int:
        turns = (("system", templates.load(name).system), ("user", "-"))
        messages = [{"role": role, "content": content} for role, content in turns]
        return len(encode_conversation(model.tokenizer, messages, **arguments)[0])

    return workloads(
        config,
        model.config,
        lengths,
        longest_problem=max(parts.capacity.longest_problem, lengths.problem),
        turns=is_dialogue(parts.environment),
        evaluated={name: len(split) for name, split in parts.splits.items() if name != "train"},
        instructions=max(map(instructions, template_names())),
    )


def held_while_sampling(
    model: Pretrained, state: TrainState | None, declared: Any, lora: bool, mesh: jax.sharding.Mesh | None
) -> int:
    """Returns the bytes per device in use while a run samples: weights, optimizer state, and the weights that
    are copied into the sampling layout. `state` may be abstract."""
    held = {id(x) for x in jax.tree.leaves((model.params, state))}
    policy = _policy(model, state, declared, lora, mesh)
    params, _ = for_sampling(policy.params, model.config, mesh)
    copies = [x for x in jax.tree.leaves(params) if id(x) not in held]
    return bytes_per_device((model.params, state, copies))


def abstract_run_state(
    config: Config,
    decoder: DecoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | None,
) -> TrainState | None:
    """Returns the abstract train state, or None if nothing is trained; see `abstract_train_state`."""
    if not trains(config):
        return None
    return abstract_train_state(abstract_trainable(config, decoder, mesh), optimizer, mesh)
