"""Checks the groups of a configuration, including constraints between fields."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, NoReturn

from espl_jax.choices import (
    CLIP_RANGES,
    ENVIRONMENTS,
    LORA_TARGETS,
    MOST_DRAFT_TOKENS,
    SEQUENCE_LOSSES,
    SHOWN,
    TRACKERS,
)
from espl_jax.data import specs
from espl_jax.environments.retrievers.server import is_address
from espl_jax.evolution.templates import Templates
from espl_jax.pretrained.named import BASES
from espl_jax.run.config import Config
from espl_jax.storage import json_values

UNTRUNCATED = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Settings that disable truncated sampling, so every token can be drawn."""


def _refuse(field: str, value: Any, fix: str) -> NoReturn:
    raise ValueError(f"{field}={value!r}: {fix}")


def check_files(config: Config) -> None:
    """Checks that data.train is set and that all files exist. Raises ValueError."""
    if not config.data.train:
        _refuse(
            "data.train",
            config.data.train,
            "no training data; give a .jsonl file, a .parquet file, hub:org/name, or a generated set such as "
            "addition:digits=2,count=200",
        )
    for split in ("train", "validation", "test"):
        spec, field = config.data[split], f"data.{split}"
        for path in specs.files(spec, field) if spec else ():
            if not path.is_file():
                _refuse(field, spec, f"{path} does not exist; correct the path")
    files = {"model.source": config.model.source, "population.start_from": config.population.start_from}
    files |= {"reflection.replay": config.reflection.replay}
    if config.environment.name == "search":
        files["environment.search.retriever"] = config.environment.search.retriever
    for field, path in files.items():
        if path.endswith((".jsonl", ".json", ".gguf")) and not Path(path).expanduser().is_file():
            _refuse(field, path, "file not found; correct the path")
    for name in config.trackers:
        if name in TRACKERS and not _is_installed(name):
            fix = f"pip install -e '.[{name}]'"
            _refuse("trackers", tuple(config.trackers), f"the package {name} is not installed; {fix}")


def _is_installed(package: str) -> bool:
    """Returns whether a package can be imported, without importing it."""
    spec = importlib.util.find_spec(package)
    # A folder of that name, such as the one that W&B writes, is found as a namespace package.
    return spec is not None and spec.origin is not None


def check_groups(config: Config) -> None:
    """Checks each group of fields, including constraints between groups. Raises ValueError."""
    _check_run(config)
    _check_trackers(config)
    _check_model(config)
    _check_sampling(config)
    _check_population(config)
    _check_selection(config)
    _check_evolution(config)
    if config.mode != "rl":
        _check_reflection(config.reflection)
        _check_shown(config)
    _check_environment(config)
    _check_loss(config.loss)
    if trains(config):
        _check_kl(config)
    _check_optimizer(config)
    _check_evaluation(config)


def trains(config: Config) -> bool:
    """Returns whether the mode trains weights."""
    return config.mode in ("espl", "rl")


def records_routing(config: Config) -> bool:
    """Whether rollouts record the choices of experts, if the model has experts."""
    return trains(config) and config.loss.sampler_routing != "ignore"


def _check_run(config: Config) -> None:
    if config.seed < 0:
        _refuse("seed", config.seed, "must be at least 0")
    # In these modes, one prompt gets the rollouts of all M prompts.
    group = config.group_size * (config.num_prompts if config.mode in ("rl", "reflection") else 1)
    if group < 2:
        _refuse(
            "group_size", config.group_size, "the advantage is always 0 in a group of one; give at least 2"
        )
    if list(config.mesh.values()).count(-1) > 1:
        _refuse("mesh", dict(config.mesh), "only one axis can be -1; set the others to positive sizes")


def _check_trackers(config: Config) -> None:
    names = tuple(config.trackers)
    if unknown := [name for name in names if name not in TRACKERS]:
        _refuse(
            "trackers", names, f"unknown {', '.join(map(repr, unknown))}; choose from {', '.join(TRACKERS)}"
        )
    if len(set(names)) < len(names):
        _refuse("trackers", names, "name each tracker once")
    if names and not re.fullmatch(r"[\w.-]+", config.tracking.project):
        _refuse("tracking.project", config.tracking.project, "use letters, digits, '.', '_' and '-' only")


def _check_model(config: Config) -> None:
    if not config.model.source:
        _refuse(
            "model.source",
            config.model.source,
            f"no model; give {', '.join(BASES)}, a .gguf file, a safetensors folder, or org/name on the Hub",
        )
    _check_json_object("model.chat_template_kwargs", config.model.chat_template_kwargs)
    targets = tuple(config.lora.targets)
    if unknown := set(targets) - set(LORA_TARGETS):
        _refuse(
            "lora.targets", targets, f"{sorted(unknown)} are not LoRA targets; choose from {LORA_TARGETS}"
        )
    if config.model.param_dtype == "int8" and trains(config) and not config.lora.rank:
        _refuse(
            "model.param_dtype",
            config.model.param_dtype,
            "lora.rank=0 trains all weights, and only frozen weights can be int8; train adapters, e.g. "
            "lora.rank=32, or use bfloat16",
        )
    if config.lora.rank and not targets:
        _refuse(
            "lora.targets", targets, "no targets; name at least one, or set lora.rank=0 to train all weights"
        )


def _check_sampling(config: Config) -> None:
    sampling = config.sampling
    if not 0 < sampling.top_p <= 1:
        _refuse("sampling.top_p", sampling.top_p, "must be above 0 and at most 1; 1 disables top-p")
    if not 0 <= sampling.draft_tokens <= MOST_DRAFT_TOKENS:
        fix = f"give 1 to {MOST_DRAFT_TOKENS}, or 0 for no drafts"
        _refuse("sampling.draft_tokens", sampling.draft_tokens, fix)
    if not sampling.min_p <= 1:
        _refuse("sampling.min_p", sampling.min_p, "must be at most 1; 0 disables min-p")
    if not all(isinstance(text, str) and text and "\ufffd" not in text for text in sampling.stop_strings):
        _refuse(
            "sampling.stop_strings",
            tuple(sampling.stop_strings),
            "stop strings must be non-empty and free of U+FFFD, the placeholder for incomplete characters",
        )
    if not trains(config):
        return
    for name in ("top_k", "min_p"):
        if sampling[name] == 1:
            _refuse(
                f"sampling.{name}",
                sampling[name],
                "only the most likely token can be sampled, and greedy rollouts have no gradient; allow more "
                "tokens, or use mode=evolution",
            )
    if not sampling.temperature > 0:
        _refuse(
            "sampling.temperature",
            sampling.temperature,
            "greedy rollouts have no gradient; give a positive temperature, or use mode=evolution",
        )


def _check_population(config: Config) -> None:
    population = config.population
    if config.evolution.form == "prose" and population.principles:
        _refuse(
            "population.principles",
            tuple(population.principles),
            "evolution.form=prose edits only the text; move the principles into population.text",
        )
    if population.start_from and (population.text or population.principles):
        _refuse(
            "population.start_from",
            population.start_from,
            "initial prompts come from this file; leave population.text and population.principles empty",
        )


def _check_selection(config: Config) -> None:
    alone = config.num_prompts == 1 or config.selection.window == 1
    if config.mode in ("espl", "evolution") and alone and config.deployment.rule == "ratings":
        _refuse(
            "deployment.rule",
            config.deployment.rule,
            "with one prompt per iteration there are no tournaments and no ratings; use newest or validation",
        )
    temperature = config.selection.temperature
    if temperature is not None and not temperature > 0:
        _refuse("selection.temperature", temperature, "must be positive, or None for the default")


def _check_evolution(config: Config) -> None:
    evolution = config.evolution
    if not 0 <= evolution.crossover_prob <= 1:
        _refuse("evolution.crossover_prob", evolution.crossover_prob, "must be between 0 and 1")
    if evolution.max_principles < max(1, len(config.population.principles)):
        _refuse(
            "evolution.max_principles",
            evolution.max_principles,
            "must be at least 1, and at least the number of principles of the root prompt",
        )


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    for split in ("validation", "test"):
        if evaluation.temperature == 0 and evaluation[f"{split}_samples"] > 1:
            _refuse(
                f"evaluation.{split}_samples",
                evaluation[f"{split}_samples"],
                "greedy samples are identical; give 1, or set evaluation.temperature above 0",
            )


def _check_environment(config: Config) -> None:
    e = config.environment
    if e.name not in ENVIRONMENTS and ":" not in e.name:
        _refuse(
            "environment.name",
            e.name,
            f"unknown environment; choose one of {', '.join(ENVIRONMENTS)}, or give module:name",
        )
    formats = ENVIRONMENTS.get(e.name, ())
    if formats and e.answer_format not in formats:
        _refuse(
            "environment.answer_format",
            e.answer_format,
            f"environment.name={e.name} does not support it; choose one of {', '.join(formats)}",
        )
    if e.reward and ":" not in e.reward:
        _refuse("environment.reward", e.reward, "must be module:function, or empty")
    _check_json_object("environment.options", e.options)
    retriever = e.search.retriever
    if e.name == "search" and not retriever and not config.data.train.startswith("encyclopedia"):
        _refuse(
            "environment.search.retriever",
            retriever,
            "no retriever; give http://host:port/retrieve or a passages.jsonl, or use data that comes with "
            "passages: --config.data=encyclopedia",
        )


def _check_json_object(field: str, text: str) -> None:
    try:
        if not isinstance(json_values.parse(text), dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        _refuse(field, text, f'{error}; give an object such as {{"key": 1}}')


def _check_loss(loss: Any) -> None:
    for name, most in (("clip_low", 1.0), ("clip_high", float("inf"))):
        bound = loss[name]
        if bound is not None and loss.kind not in CLIP_RANGES:
            _refuse(
                f"loss.{name}",
                bound,
                f"loss.kind={loss.kind} does not clip; give None, or use one of {', '.join(CLIP_RANGES)}",
            )
        if bound is not None and not 0 <= bound <= most:
            _refuse(
                f"loss.{name}",
                bound,
                "must be at least 0, and clip_low at most 1: ratios are clipped to [1 - low, 1 + high]",
            )
    if loss.kind in SEQUENCE_LOSSES and loss.aggregation != "seq_mean_token_sum":
        _refuse(
            "loss.aggregation",
            loss.aggregation,
            f"loss.kind={loss.kind} has one term per rollout, not per token; use seq_mean_token_sum",
        )
    if 0 < loss.sampler_weight_cap < 1:
        _refuse(
            "loss.sampler_weight_cap",
            loss.sampler_weight_cap,
            "a cap below 1 scales down all terms; give at least 1, e.g. 2, or 0 for no weights",
        )
    if loss.kl_coef and loss.kl_estimator == "k1":
        _refuse(
            "loss.kl_estimator",
            loss.kl_estimator,
            "its expected gradient is zero, so it does not regularize; use exact, or k2, which has the "
            "gradient of the KL",
        )


def _check_kl(config: Config) -> None:
    """Checks that sampling is untruncated if the KL estimator needs it. The update checks its batch again."""
    cut = [name for name, all_tokens in UNTRUNCATED.items() if config.sampling[name] != all_tokens]
    if config.loss.kl_coef and config.loss.kl_estimator != "exact" and cut:
        named = ", ".join(f"sampling.{name}={config.sampling[name]}" for name in cut)
        _refuse(
            "loss.kl_estimator",
            config.loss.kl_estimator,
            f"requires untruncated sampling, but {named}; use exact, or disable top_p, top_k and min_p",
        )


def _check_optimizer(config: Config) -> None:
    o = config.optimizer
    if trains(config) and not o.learning_rate > 0:
        _refuse(
            "optimizer.learning_rate",
            o.learning_rate,
            "must be positive; to leave the weights alone, use mode=evolution",
        )
    for name in ("b1", "b2"):
        if not 0 <= o[name] < 1:
            _refuse(f"optimizer.{name}", o[name], "must be at least 0 and below 1")
    if o.weight_decay and o.kind != "adamw":
        _refuse(
            "optimizer.weight_decay",
            o.weight_decay,
            f"{o.kind} has no weight decay; set optimizer.kind=adamw, or give 0",
        )
    if o.schedule == "constant":
        if o.final_rate:
            _refuse(
                "optimizer.final_rate",
                o.final_rate,
                "optimizer.schedule=constant does not decay; use linear or cosine, or give 0",
            )
        return
    if o.final_rate > 1:
        _refuse("optimizer.final_rate", o.final_rate, "must be at most 1: it is a fraction of learning_rate")
    updates = config.num_iterations * config.loss.epochs * config.loss.minibatches
    if o.warmup_steps >= updates:
        _refuse(
            "optimizer.warmup_steps",
            o.warmup_steps,
            f"optimizer.schedule={o.schedule} decays after the warm-up, but the run has only {updates} "
            "updates; give fewer",
        )


def _check_reflection(r: Any) -> None:
    if r.reflector == "openai" and not r.model:
        _refuse(
            "reflection.model",
            r.model,
            "no model; give the name of a model on the server at reflection.base_url",
        )
    if r.reflector == "openai" and not is_address(r.base_url):
        _refuse(
            "reflection.base_url",
            r.base_url,
            "not an HTTP address; give one such as http://localhost:8000/v1",
        )
    if r.reflector == "openai" and r.base_url.rstrip("/").endswith("/chat/completions"):
        _refuse(
            "reflection.base_url", r.base_url, "/chat/completions is appended automatically; leave it out"
        )
    if r.reflector == "replay" and not r.replay:
        _refuse(
            "reflection.replay",
            r.replay,
            "no file to replay; give the reflections.jsonl or replies.jsonl of a run",
        )
    if r.reflector == "openai" and r.opening:
        _refuse(
            "reflection.opening",
            r.opening,
            "replies of a server cannot be prefilled; set it to False",
        )
    if r.reflector != "local" and r.policy == "current":
        _refuse(
            "reflection.policy",
            r.policy,
            "only reflection.reflector=local can use the current weights; use it, or policy=reference",
        )
    if r.source and (r.reflector != "local" or r.policy == "current"):
        _refuse(
            "reflection.source",
            r.source,
            "another model reflects on device, with its own weights; give reflector=local and "
            "policy=reference, or leave it empty",
        )
    _check_json_object("reflection.chat_template_kwargs", r.chat_template_kwargs)
    Templates(r.templates).check(r.reasoning)
    if not r.timeout > 0:
        _refuse("reflection.timeout", r.timeout, "must be a positive number of seconds")


def _check_shown(config: Config) -> None:
    """Checks what the reflector is shown, and that rewrites come in one stage."""
    r, shown = config.reflection, tuple(config.reflection.show)
    if unknown := [part for part in shown if part not in SHOWN]:
        _refuse("reflection.show", shown, f"{unknown[0]!r} is unknown; choose from {', '.join(SHOWN)}")
    if {"summary", "trajectory"} <= {*shown}:
        _refuse("reflection.show", shown, "an attempt is shown whole or as a summary; leave out one of them")
    if not {"verdict", "feedback"} & {*shown}:
        _refuse("reflection.show", shown, "nothing says what was wrong; add verdict or feedback")
    if config.evolution.output == "rewrite" and r.stages != 1:
        _refuse(
            "evolution.output", config.evolution.output, "a rewrite takes one call; give reflection.stages=1"
        )
