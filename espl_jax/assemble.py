"""From a configuration to the parts of a run: model, problems, environment, optimizer."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from espl_jax import inputs, json_values, processes, sharding, storage
from espl_jax.context import context_of, fitting, least_budget
from espl_jax.data.problems import ProblemSet
from espl_jax.environments.base import Dialogue, Environment
from espl_jax.evolution import population as populations
from espl_jax.evolution.guards import Guards
from espl_jax.evolution.templates import load_template, template_names
from espl_jax.memory import bytes_per_device
from espl_jax.models import lora
from espl_jax.models.config import NUMERICS, DecoderConfig
from espl_jax.models.transformer import abstract
from espl_jax.optimizer import make_optimizer
from espl_jax.pretrained import Pretrained, load_pretrained, read_config
from espl_jax.pretrained.numerics import AUTO, CHOSEN, resolve
from espl_jax.rl.losses import Loss
from espl_jax.rollout import longest_conversation, longest_problem, stable_hash
from espl_jax.sampling.layout import for_sampling
from espl_jax.sampling.sizes import Sizes
from espl_jax.sampling.truncation import Truncation
from espl_jax.samplings import Lengths, Sampling, samplings
from espl_jax.task import environment_of, load_splits
from espl_jax.text.chat import encode, encode_conversation
from espl_jax.train_step import TrainState, abstract_train_state, init_train_state, sampling_params
from espl_jax.types import SystemPrompt, TrainBatch


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


def settle_numerics(config: ConfigDict, workdir: str | os.PathLike[str] | None = None) -> ConfigDict:
    """Returns the configuration with a value in place of every "auto" among its numerics.

    Args:
      config: of the run.
      workdir: of the run; one that is resumed keeps the values recorded in its config.json.
    """
    settled = config.copy_and_resolve_references()
    recorded = _recorded_numerics(workdir) if workdir is not None else {}
    given = {name: config.model[name] for name in CHOSEN}
    given |= {name: value for name, value in recorded.items() if given.get(name) == AUTO}
    mesh = sharding.make_mesh(dict(config.mesh))
    chosen = resolve(
        given, lambda: read_config(config.model.source), devices=1 if mesh is None else mesh.size
    )
    for name, value in processes.decide(lambda: chosen).items():
        settled.model[name] = value
    return settled


def _recorded_numerics(workdir: str | os.PathLike[str]) -> dict[str, str]:
    try:
        model = json.loads(storage.open_folder(workdir).read("config.json") or "{}").get("model", {})
    except ValueError:  # cut short; opening the work directory says so
        return {}
    return {name: model[name] for name in CHOSEN if name in model}


def numerics(config: Any) -> dict[str, Any]:
    """The DecoderConfig fields that the run chooses."""
    return {name: config.model[name] for name in NUMERICS} | {"lora_scale": config.lora.scale}


def load_reference(config: Any, mesh: jax.sharding.Mesh | None, **changes: Any) -> Pretrained:
    """The model that a run begins with; DecoderConfig fields in `changes` go before those of the run.

    Where weights are trained, an adapter that it came with is merged into them: adapters of the run's own
    take its place.
    """
    model = load_pretrained(config.model.source, mesh=mesh, **numerics(config) | changes)
    _, adapters = lora.detach(model.params)
    if not adapters or not trains(config):
        return model
    merged = jax.jit(lora.merge, static_argnames="config")(model.params, model.config)
    return dataclasses.replace(
        model, params=merged, config=model.config.replace(lora_scale=config.lora.scale)
    )


def trains(config: Any) -> bool:
    """Whether the mode changes weights."""
    return config.mode in ("espl", "rl")


def stream_key(seed: int, stream: str, iteration: int) -> jax.Array:
    """The key of one stream of random numbers (`train`, `validation`, `reflection`, ...) in one iteration."""
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, stable_hash(stream)), iteration)


def declared_trainable(config: Any, decoder: DecoderConfig) -> Any:
    """Declarations of what is trained: adapters, or with rank 0 all weights."""
    if config.lora.rank:
        return lora.abstract_adapters(decoder, config.lora.rank, tuple(config.lora.targets))
    return abstract(decoder)


def abstract_trainable(config: Any, decoder: DecoderConfig, mesh: jax.sharding.Mesh | None) -> Any:
    """Shapes of what is trained: adapters, or with rank 0 all weights; float32, sharded over the mesh."""
    declared = declared_trainable(config, decoder)
    shapes = jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.shape, jnp.float32), declared)
    return sharding.place(shapes, declared, mesh)


def abstract_run_state(config: Any, parts: Parts) -> TrainState | None:
    """Shapes of the train state, or None where nothing is trained; see `abstract_train_state`."""
    if not parts.trains:
        return None
    trainable = abstract_trainable(config, parts.reference.config, parts.mesh)
    return abstract_train_state(trainable, parts.optimizer, parts.mesh)


def first_train_state(config: Any, parts: Parts) -> TrainState | None:
    """The train state before the first update: fresh adapters, or a float32 copy of the params."""
    if not parts.trains:
        return None
    model = parts.reference

    def make(key: jax.Array, params: Any) -> TrainState:
        if parts.lora:
            trainable = lora.init(key, model.config, config.lora.rank, tuple(config.lora.targets))
        else:
            trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
        return init_train_state(trainable, parts.optimizer)

    arguments = stream_key(config.seed, "adapters", 0), None if parts.lora else model.params
    if parts.mesh is None:
        return make(*arguments)
    # Jitted, so that no array is ever whole on one device.
    shardings = jax.tree.map(lambda x: x.sharding, abstract_run_state(config, parts))
    return jax.jit(make, out_shardings=shardings)(*arguments)


def first_population(config: Any) -> populations.Population:
    """The root prompt, the user's own first prompts, or the population of an earlier run.

    Raises:
      ValueError: if `population.start_from` holds neither.
    """
    c = config.population
    if not c.start_from:
        return populations.start([SystemPrompt(text=c.text, principles=tuple(c.principles))], c.max_size)
    text = Path(c.start_from).expanduser().read_text(encoding="utf-8")
    try:
        population = _read_population(text, c)
        for member in population.members:
            json_values.check_characters(member.render(), f"the prompt {member.id}")
        return _no_principles_in_prose(population, config)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"population.start_from={c.start_from!r}: {error}; give the population.json of a run, or "
            'a .jsonl file with one prompt a line, {"text": ..., "principles": [...]}'
        ) from None


def _read_population(text: str, c: Any) -> populations.Population:
    if not c.start_from.endswith(".jsonl"):
        saved = populations.from_json(json_values.parse(text))
        return dataclasses.replace(saved, members=saved.members[-c.max_size :], max_size=c.max_size)
    # Not splitlines, which also splits at characters that JSON strings may hold.
    roots = [_root(line, i) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return populations.start(roots, c.max_size)


def _root(text: str, line: int) -> SystemPrompt:
    try:
        given = json_values.parse(text)
    except ValueError as error:
        raise ValueError(f"line {line} is not JSON ({error})") from error
    if unknown := given.keys() - {"text", "principles"}:
        raise ValueError(f"line {line} has unknown fields {sorted(unknown)}")
    text, principles = given.get("text", ""), given.get("principles", [])
    listed = isinstance(principles, list) and all(isinstance(each, str) for each in principles)
    if not (isinstance(text, str) and listed):
        raise ValueError(f"line {line}: text is a string, principles a list of strings")
    return SystemPrompt(text, tuple(principles))


def _no_principles_in_prose(population: populations.Population, config: Any) -> populations.Population:
    with_principles = [member.id for member in population.members if member.principles]
    if config.evolution.form == "prose" and with_principles:
        raise ValueError(
            f"evolution.form=prose edits the text alone, but {', '.join(with_principles)} have principles"
        )
    return population
