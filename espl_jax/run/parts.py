"""From a configuration to the parts of a run: model, problems, environment, optimizer."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import optax

from espl_jax.data.problems import ProblemSet
from espl_jax.environments.base import Dialogue, Environment, is_dialogue
from espl_jax.evolution.evolve import Evolution
from espl_jax.evolution.guards import Guards
from espl_jax.evolution.templates import load_template, template_names
from espl_jax.models.config import DecoderConfig
from espl_jax.parallel import processes, sharding
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
from espl_jax.run.weights import abstract_trainable, declared_trainable, load_reference
from espl_jax.run.workloads import Lengths, Workload, workloads
from espl_jax.sampling.layout import for_sampling
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.sampling.sizes import Sizes
from espl_jax.sampling.truncation import Truncation
from espl_jax.text.chat import encode, encode_conversation
from espl_jax.text.chat_format import ChatFormat
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
      declared: declarations of what is trained.
      chat: how conversations become text.
      sampling: how rollouts are drawn.
      capacity: what of the devices rollouts may take.
      evolution: how prompts change.
      objective: what updates make smaller.
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
    chat: ChatFormat
    sampling: Sampling
    capacity: Capacity
    evolution: Evolution
    objective: Objective
    inputs: inputs.Fingerprints
    left_out: dict[str, tuple[str, ...]]

    @property
    def frozen(self) -> Any:
        """The base of the adapters, or None in full fine-tuning."""
        return self.reference.params if self.lora else None

    def policy(self, state: TrainState | None) -> Pretrained:
        """The model with the weights of a train state; the reference where nothing is trained."""
        return _policy(self.reference, state, self.declared, self.lora, self.mesh)

    def step_arguments(self, state: TrainState, batch: TrainBatch) -> tuple[Any, ...]:
        """What `policy_gradient_step` is called with, beside `microbatch_rows`."""
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
    """Loads and builds everything. Raises as the parts do; `check_config` has been called before."""
    mesh = sharding.make_mesh(dict(config.mesh))
    splits = processes.decide(lambda: load_splits(config))
    environment = environment_of(config)
    model = load_reference(config, mesh)
    read = processes.decide(lambda: inputs.fingerprints(config, splits, model.files))
    splits, left_out = fitting(config, splits, model, environment)
    problems = [problem for split in splits.values() for problem in split.problems]
    chat, optimizer = chat_format(config), make_optimizer_of(config)
    declared = declared_trainable(config, model.config)
    state = abstract_run_state(config, model.config, optimizer, mesh)
    capacity = Capacity(
        max_rows=config.sampling.max_rows or None,
        held_bytes=held_while_sampling(model, state, declared, bool(config.lora.rank), mesh),
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
        objective=objective_of(config),
        inputs=read,
        left_out=left_out,
    )


def chat_format(config: Config) -> ChatFormat:
    """How the conversations of a run become text."""
    return ChatFormat(
        template_arguments=json.loads(config.model.chat_template_kwargs),
        show_thinking=config.environment.show_thinking,
        tool_format=config.environment.tool_format,
        stop_strings=tuple(config.sampling.stop_strings),
    )


def sampling_of(config: Config) -> Sampling:
    """How the rollouts of a run are drawn."""
    return Sampling(
        max_new_tokens=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature,
        truncation=Truncation(config.sampling.top_k, config.sampling.top_p, config.sampling.min_p),
        context_limit=config.sampling.context_limit or None,
    )


def evolution_of(config: Config, guards: Guards) -> Evolution:
    """How the prompts of a run change."""
    return Evolution(
        form=config.evolution.form,
        guards=guards,
        opening=config.reflection.opening,
        constrained=config.reflection.constrained,
        crossover_prob=0.0 if config.mode == "reflection" else config.evolution.crossover_prob,
        crossover_sigma=config.evolution.crossover_sigma,
        mutation_sigma=config.evolution.mutation_sigma,
        tie_margin=config.ratings.tie_margin,
    )


def objective_of(config: Config) -> Objective:
    """What the updates of a run make smaller."""
    names = ("kind", "clip_low", "clip_high", "aggregation", "sampler_weight_cap")
    fields = {name: config.loss[name] for name in names}
    return Objective(
        loss=Loss(**fields, constant_length=config.sampling.max_new_tokens),
        temperature=config.sampling.temperature,
        kl_coef=config.loss.kl_coef,
        kl_estimator=config.loss.kl_estimator,
    )


def make_optimizer_of(config: Config) -> optax.GradientTransformation:
    """The optax chain; schedules end with the last update that the run can take."""
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
    """What evolution accepts; prompts and problems are measured in tokens of the model.

    A prompt leaves room in the context for the longest problem and a whole rollout, or where these fill it
    themselves, takes a quarter of it at most.
    """
    context = context_of(config, model.config)
    problems = [problem for split in splits.values() for problem in split.problems]
    longest = longest_conversation(model.tokenizer, problems, environment, chat.template_arguments)
    room = context - max(longest_problem + config.sampling.max_new_tokens, longest + 1)
    names = ("max_edits", "max_words", "word_retries", "max_principles", "copied_tokens", "copied_answers")
    return Guards(
        **{name: config.evolution[name] for name in names},
        max_prompt_tokens=max(min(config.evolution.max_prompt_tokens, room), least_budget(config, context)),
        max_reply_tokens=config.reflection.max_new_tokens,
        tokenize=functools.partial(encode, model.tokenizer),
        problems=splits["train"].problems,
    )


def rollout_sizes(config: Config, parts: Parts) -> tuple[Sizes, ...]:
    """What the rollouts of a training iteration reserve and compile for, whatever its problems."""
    longest = Lengths(0, parts.capacity.longest_problem, config.sampling.max_new_tokens)
    rollouts = workloads_of(config, parts, longest)[0]
    held = parts.capacity.held_bytes
    assert held is not None
    return rollouts.sizes(parts.reference.config, held, parts.mesh)


def workloads_of(config: Config, parts: Parts, lengths: Lengths) -> list[Workload]:
    """All samplings of the run; its rollouts are as long as `lengths` say."""
    model, arguments = parts.reference, parts.chat.template_arguments

    def instructions(name: str) -> int:
        turns = (("system", load_template(name).system), ("user", "-"))
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
    """Bytes of each device that are taken while a run samples: weights, the optimizer's state, and what of
    the policy is laid out anew for sampling. The state may be one of shapes."""
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
    """Shapes of the train state, or None where nothing is trained; see `abstract_train_state`."""
    if not trains(config):
        return None
    return abstract_train_state(abstract_trainable(config, decoder, mesh), optimizer, mesh)
