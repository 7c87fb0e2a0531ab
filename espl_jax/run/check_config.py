"""Refuses configurations that cannot run, before anything is loaded; every message says how to mend it.

The names of baselines, losses, optimizers and weights are written out, because the modules that have them
import jax, which takes longer than all the checks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espl_jax.data import specs
from espl_jax.environments.retrievers.server import is_address
from espl_jax.evolution.deployment import RULES
from espl_jax.evolution.editors import EDITORS
from espl_jax.evolution.ratings import SYSTEMS
from espl_jax.evolution.schemas import blocks_schema, edits_schema
from espl_jax.evolution.selection import STRATEGIES
from espl_jax.models.config import MATMUL_PRECISIONS, REMATS, SAMPLING_LAYOUTS
from espl_jax.run.config import Config
from espl_jax.storage import json_values
from espl_jax.text.tool_calls import FORMATS

MODES = ("espl", "rl", "evolution", "reflection")
ENVIRONMENTS = {"math": ("boxed", "expression"), "arithmetic": ("boxed", "last_number"), "search": ()}
"""What each environment can read, where there is a choice."""

SEARCH_LIMITS = ("passages", "max_turns", "max_passage_words", "concurrency")
BASELINES = ("per_prompt", "marginalized")
NORMALIZATIONS = ("none", "std", "batch_std")
LOSSES = ("importance_sampling", "sequence_importance_sampling", "ppo", "cispo", "gspo")
SEQUENCE_LOSSES = ("sequence_importance_sampling", "gspo")
CLIPPED_LOSSES = ("ppo", "cispo", "gspo")
AGGREGATIONS = ("seq_mean_token_sum", "token_mean", "constant_length")
KL_ESTIMATORS = ("exact", "k1", "k2", "k3")
UNTRUNCATED = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""The settings of sampling with which every token may be drawn."""

OPTIMIZERS = ("adam", "adamw", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")
REFLECTORS = ("local", "openai", "replay")
LORA_TARGETS = ("query", "key", "value", "out", "gate", "up", "down", "head")

_CHOICES = {
    "mode": MODES,
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.param_dtype": ("auto", "float32", "bfloat16"),
    "model.matmul_precision": ("auto", *MATMUL_PRECISIONS),
    "model.sampling_layout": SAMPLING_LAYOUTS,
    "model.remat": REMATS,
    "data.too_long": ("refuse", "drop"),
    "environment.tool_format": ("auto", *FORMATS),
    "selection.strategy": tuple(STRATEGIES),
    "ratings.system": tuple(SYSTEMS),
    "evolution.form": tuple(EDITORS),
    "deployment.rule": RULES,
    "reflection.reflector": REFLECTORS,
    "reflection.policy": ("reference", "current"),
    "loss.kind": LOSSES,
    "loss.aggregation": AGGREGATIONS,
    "loss.baseline": BASELINES,
    "loss.normalize_advantages": NORMALIZATIONS,
    "loss.kl_estimator": KL_ESTIMATORS,
    "optimizer.kind": OPTIMIZERS,
    "optimizer.schedule": SCHEDULES,
    "resume.changed_inputs": ("refuse", "allow"),
}
_AT_LEAST = {
    **dict.fromkeys(("num_iterations", "num_prompts", "batch_size", "group_size"), 1),
    **dict.fromkeys(("checkpoint_every", "checkpoint_keep"), 1),
    **dict.fromkeys(
        ("sampling.max_new_tokens", "reflection.max_new_tokens", "reflection.max_input_tokens"), 1
    ),
    **dict.fromkeys(
        ("population.max_size", "selection.window", "evolution.max_edits", "evolution.max_words"), 1
    ),
    **dict.fromkeys(("evolution.max_prompt_tokens", "deployment.candidates", "reflection.concurrency"), 1),
    **dict.fromkeys(("evolution.word_retries", "evolution.copied_tokens", "deployment.min_tournaments"), 0),
    **dict.fromkeys(("reflection.max_retries", "reflection.price_input", "reflection.price_output"), 0),
    "ratings.drift_sigma": 0,
    **dict.fromkeys(("evaluation.validation_samples", "evaluation.test_samples", "data.validation_count"), 1),
    **dict.fromkeys(
        ("lora.rank", "loss.kl_coef", "loss.microbatch_rows", "sampling.max_rows", "evaluation.every"), 0
    ),
    **dict.fromkeys(("sampling.top_k", "sampling.min_p", "sampling.context_limit"), 0),
    **dict.fromkeys(("sampling.temperature", "reflection.temperature", "evaluation.temperature"), 0),
    **dict.fromkeys(("evolution.mutation_sigma", "evolution.crossover_sigma", "evolution.crossover_prob"), 0),
    **dict.fromkeys(("ratings.tie_margin", "optimizer.max_grad_norm", "optimizer.warmup_steps"), 0),
    **dict.fromkeys(("optimizer.weight_decay", "optimizer.final_rate", "optimizer.max_skipped"), 0),
    **dict.fromkeys(("loss.epochs", "loss.minibatches"), 1),
    "loss.sampler_weight_cap": 0,
    "profile_iteration": 0,
    **dict.fromkeys((f"environment.search.{name}" for name in SEARCH_LIMITS), 1),
    "environment.search.timeout": 1,
    "environment.math.timeout": 0.1,
    "environment.math.workers": 1,
    "environment.math.memory_mib": 256,
}


def check_config(config: Config, files: bool = True) -> None:
    """Checks every field, and the fields against each other. Unknown fields ml_collections refuses itself.

    Args:
      config: the run's Config, made from `configs/common.py`.
      files: whether problems have to be named, and files be there.

    Raises:
      ValueError: naming the field, its value and the fix.
    """
    given = _flat(config)
    for field, choices in _CHOICES.items():
        if given[field] not in choices:
            raise ValueError(f"{field}={given[field]!r}: choose one of {', '.join(choices)}")
    for field, least in _AT_LEAST.items():
        if not given[field] >= least:
            raise ValueError(f"{field}={given[field]!r}: give at least {least}")
    if files:
        _check_files(config)
    _check_together(config)


def _refuse(field: str, value: Any, fix: str) -> None:
    raise ValueError(f"{field}={value!r}: {fix}")


def _check_files(config: Config) -> None:
    if not config.data.train:
        _refuse(
            "data.train",
            config.data.train,
            "give a .jsonl file, a .parquet file, hub:org/name, or a generated set such as "
            "addition:digits=2,count=200",
        )
    for split in ("train", "validation", "test"):
        spec, field = config.data[split], f"data.{split}"
        for path in specs.files(spec, field) if spec else ():
            if not path.is_file():
                _refuse(field, spec, f"there is no such file as {path}; correct the path")
    files = {"model.source": config.model.source, "population.start_from": config.population.start_from}
    files |= {"reflection.replay": config.reflection.replay}
    if config.environment.name == "search":
        files["environment.search.retriever"] = config.environment.search.retriever
    for field, path in files.items():
        if path.endswith((".jsonl", ".json", ".gguf")) and not Path(path).expanduser().is_file():
            _refuse(field, path, "there is no such file; correct the path")


def _check_together(config: Config) -> None:
    if not config.model.source:
        _refuse(
            "model.source",
            config.model.source,
            "say which model: smollm2, a .gguf file, a folder of safetensors, or org/name on the hub",
        )
    if not 0 < config.sampling.top_p <= 1:
        _refuse("sampling.top_p", config.sampling.top_p, "give a probability above 0, or 1 for all tokens")
    if not config.sampling.min_p <= 1:
        _refuse("sampling.min_p", config.sampling.min_p, "give a ratio of at most 1, or 0 for all tokens")
    if not all(
        isinstance(text, str) and text and "\ufffd" not in text for text in config.sampling.stop_strings
    ):
        _refuse(
            "sampling.stop_strings",
            tuple(config.sampling.stop_strings),
            "give strings that are not empty and have no U+FFFD, which stands for every unfinished character",
        )
    trains = config.mode in ("espl", "rl")
    for name, only in (("top_k", 1), ("min_p", 1)):
        if trains and config.sampling[name] == only:
            _refuse(
                f"sampling.{name}",
                config.sampling[name],
                "this draws the most likely token always, and greedy rollouts cannot be trained on; let more "
                "tokens be drawn, or use mode=evolution",
            )
    if trains and not config.sampling.temperature > 0:
        _refuse(
            "sampling.temperature",
            config.sampling.temperature,
            "greedy rollouts cannot be trained on; give a positive one, or mode=evolution",
        )
    # In these modes one prompt takes the places of all.
    group = config.group_size * (config.num_prompts if config.mode in ("rl", "reflection") else 1)
    if group < 2:
        _refuse(
            "group_size", config.group_size, "a group of one has no advantage over itself; give at least 2"
        )
    if trains and not config.optimizer.learning_rate > 0:
        _refuse(
            "optimizer.learning_rate",
            config.optimizer.learning_rate,
            "give a positive one, or mode=evolution",
        )
    if unknown := set(config.lora.targets) - set(LORA_TARGETS):
        _refuse(
            "lora.targets",
            tuple(config.lora.targets),
            f"{sorted(unknown)} cannot be adapted; choose from {LORA_TARGETS}",
        )
    if config.evolution.form == "prose" and config.population.principles:
        _refuse(
            "population.principles",
            tuple(config.population.principles),
            "evolution.form=prose edits the text alone; put them into population.text",
        )
    alone = config.num_prompts == 1 or config.selection.window == 1
    if config.mode in ("espl", "evolution") and alone and config.deployment.rule == "ratings":
        _refuse(
            "deployment.rule",
            config.deployment.rule,
            "with one prompt an iteration nobody is ever rated; give newest or validation",
        )
    if config.mode != "rl":
        _check_reflection(config.reflection)
        _check_reply_length(config)
    if not 0 <= config.evolution.crossover_prob <= 1:
        _refuse(
            "evolution.crossover_prob", config.evolution.crossover_prob, "a probability is between 0 and 1"
        )
    if config.selection.temperature is not None and not config.selection.temperature > 0:
        _refuse(
            "selection.temperature",
            config.selection.temperature,
            "give a positive one, or None for the default",
        )
    _check_environment(config)
    if config.population.start_from and (config.population.text or config.population.principles):
        _refuse(
            "population.start_from",
            config.population.start_from,
            "a saved population brings its own prompts; leave population.text and .principles empty",
        )
    if config.seed < 0:
        _refuse("seed", config.seed, "give 0 or more")
    if config.lora.rank and not config.lora.targets:
        _refuse(
            "lora.targets", tuple(config.lora.targets), "name some, or give lora.rank=0 to train all weights"
        )
    if config.evolution.max_principles < max(1, len(config.population.principles)):
        _refuse(
            "evolution.max_principles",
            config.evolution.max_principles,
            "give room for the root's principles, and for one at least",
        )
    _check_loss(config.loss)
    if trains:
        _check_kl(config)
    _check_optimizer(config)
    for split in ("validation", "test"):
        if config.evaluation.temperature == 0 and config.evaluation[f"{split}_samples"] > 1:
            _refuse(
                f"evaluation.{split}_samples",
                config.evaluation[f"{split}_samples"],
                "greedy samples are all the same; give 1, or an evaluation.temperature above 0",
            )
    _check_json_object("model.chat_template_kwargs", config.model.chat_template_kwargs)
    if list(config.mesh.values()).count(-1) > 1:
        _refuse("mesh", dict(config.mesh), "only one axis can take the rest")


def _check_environment(config: Config) -> None:
    e = config.environment
    if e.name not in ENVIRONMENTS and ":" not in e.name:
        _refuse(
            "environment.name",
            e.name,
            f"choose one of {', '.join(ENVIRONMENTS)}, or give a module:name of your own",
        )
    formats = ENVIRONMENTS.get(e.name, ())
    if formats and e.answer_format not in formats:
        _refuse(
            "environment.answer_format",
            e.answer_format,
            f"environment.name={e.name} reads one of {', '.join(formats)}",
        )
    if e.reward and ":" not in e.reward:
        _refuse("environment.reward", e.reward, "give module:function, or nothing")
    _check_json_object("environment.options", e.options)
    retriever = e.search.retriever
    if e.name == "search" and not retriever and not config.data.train.startswith("encyclopedia"):
        _refuse(
            "environment.search.retriever",
            retriever,
            "say where to search: http://host:port/retrieve, or a passages.jsonl; or take data that has "
            "passages of its own, --config.data=encyclopedia",
        )


def _check_json_object(field: str, text: str) -> None:
    try:
        if not isinstance(json_values.parse(text), dict):
            raise ValueError("not an object")
    except ValueError as error:
        _refuse(field, text, f"{error}; give a JSON object")


def _check_loss(loss: Any) -> None:
    for name, most in (("clip_low", 1.0), ("clip_high", float("inf"))):
        bound = loss[name]
        if bound is not None and loss.kind not in CLIPPED_LOSSES:
            _refuse(
                f"loss.{name}",
                bound,
                f"loss.kind={loss.kind} does not clip; give None, or a kind of {', '.join(CLIPPED_LOSSES)}",
            )
        if bound is not None and not 0 <= bound <= most:
            _refuse(
                f"loss.{name}",
                bound,
                "ratios are kept from 1 - clip_low to 1 + clip_high; give 0 or more, and clip_low at most 1",
            )
    if loss.kind in SEQUENCE_LOSSES and loss.aggregation != "seq_mean_token_sum":
        _refuse(
            "loss.aggregation",
            loss.aggregation,
            f"loss.kind={loss.kind} has one term a rollout, none a token; give seq_mean_token_sum",
        )
    if 0 < loss.sampler_weight_cap < 1:
        _refuse(
            "loss.sampler_weight_cap",
            loss.sampler_weight_cap,
            "it would shrink the loss where sampler and trainer agree; give 1 or more, such as 2, or 0",
        )
    if loss.kl_coef and loss.kl_estimator == "k1":
        _refuse(
            "loss.kl_estimator",
            loss.kl_estimator,
            "its gradient is zero on average, so that it holds nothing back; give exact, or k2, whose "
            "gradient is that of the KL",
        )


def _check_kl(config: Config) -> None:
    """Whether sampling draws what the estimate of the KL needs; the update checks it too, of its batch."""
    cut = [name for name, all_tokens in UNTRUNCATED.items() if config.sampling[name] != all_tokens]
    if config.loss.kl_coef and config.loss.kl_estimator != "exact" and cut:
        named = ", ".join(f"sampling.{name}={config.sampling[name]}" for name in cut)
        _refuse(
            "loss.kl_estimator",
            config.loss.kl_estimator,
            f"it requires untruncated sampling, and there is {named}; give exact, or disable top_p, top_k "
            "and min_p",
        )


def _check_optimizer(config: Config) -> None:
    o = config.optimizer
    for name in ("b1", "b2"):
        if not 0 <= o[name] < 1:
            _refuse(f"optimizer.{name}", o[name], "a decay is at least 0 and below 1")
    if o.weight_decay and o.kind != "adamw":
        _refuse(
            "optimizer.weight_decay", o.weight_decay, f"{o.kind} has none; give optimizer.kind=adamw, or 0"
        )
    if o.schedule == "constant":
        if o.final_rate:
            _refuse(
                "optimizer.final_rate",
                o.final_rate,
                "a constant schedule ends where it is; give linear or cosine, or 0",
            )
        return
    if o.final_rate > 1:
        _refuse("optimizer.final_rate", o.final_rate, "it is a part of learning_rate; give at most 1")
    updates = config.num_iterations * config.loss.epochs * config.loss.minibatches
    if o.warmup_steps >= updates:
        _refuse(
            "optimizer.warmup_steps",
            o.warmup_steps,
            f"optimizer.schedule={o.schedule} falls after the warm-up, and the run has {updates} updates; "
            "give fewer",
        )


def _check_reflection(r: Any) -> None:
    if r.reflector == "openai" and not r.model:
        _refuse("reflection.model", r.model, "say what the server at reflection.base_url calls its model")
    if r.reflector == "openai" and not is_address(r.base_url):
        _refuse("reflection.base_url", r.base_url, "give an address such as http://localhost:8000/v1")
    if r.reflector == "openai" and r.base_url.rstrip("/").endswith("/chat/completions"):
        _refuse("reflection.base_url", r.base_url, "leave out /chat/completions, which is added to it")
    if r.reflector == "replay" and not r.replay:
        _refuse("reflection.replay", r.replay, "give the reflections.jsonl or replies.jsonl of a run")
    if r.reflector == "openai" and r.opening:
        _refuse(
            "reflection.opening",
            r.opening,
            "a server cannot be given the beginning of its reply; give False",
        )
    if r.reflector != "local" and r.policy == "current":
        _refuse(
            "reflection.policy",
            r.policy,
            "current weights reflect on device alone; give reflector=local, or policy=reference",
        )
    if not r.timeout > 0:
        _refuse("reflection.timeout", r.timeout, "give seconds, more than 0")


def _check_reply_length(config: Config) -> None:
    """Whether the longest replies that schemas ask for have room. Raises ValueError."""
    if not config.reflection.constrained or config.reflection.reflector == "replay":
        return
    room = {"max_reply_tokens": config.reflection.max_new_tokens, "max_edits": 1, "max_chars": 1}
    if config.evolution.form == "prose":
        blocks_schema((), evidence=True, **room)
        return
    names = [f"{letter}{number}" for letter in "GC" for number in (998, 999)]
    edits_schema(("modify", "merge"), names, **room)
    edits_schema(("add", "modify", "remove"), names, evidence=True, **room)


def _flat(config: Config, prefix: str = "") -> dict[str, Any]:
    fields = {}
    for name, value in config.items():
        fields |= _flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {f"{prefix}{name}": value}
    return fields
