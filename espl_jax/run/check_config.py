"""Rejects configurations that cannot run, before anything is loaded and without importing jax."""

from __future__ import annotations

from typing import Any

from espl_jax.choices import (
    AGGREGATIONS,
    BASELINES,
    CACHE_DTYPES,
    DTYPES,
    EDIT_FORMATS,
    KL_ESTIMATORS,
    LOSSES,
    MATMUL_PRECISIONS,
    MODES,
    NORMALIZATIONS,
    OPTIMIZERS,
    OUTPUTS,
    PARAM_DTYPES,
    REASONINGS,
    REFLECTED_PROBLEMS,
    REFLECTORS,
    REMATS,
    ROUTINGS,
    SAMPLING_LAYOUTS,
    SCHEDULES,
)
from espl_jax.evolution.deployment import RULES
from espl_jax.evolution.editors import EDITORS
from espl_jax.evolution.ratings import SYSTEMS
from espl_jax.evolution.selection import STRATEGIES
from espl_jax.run.check_groups import check_files, check_groups
from espl_jax.run.config import Config
from espl_jax.text.tool_calls import FORMATS

SEARCH_LIMITS = ("passages", "max_turns", "max_passage_words", "concurrency")

_CHOICES = {
    "mode": MODES,
    "model.dtype": ("auto", *DTYPES),
    "model.param_dtype": ("auto", *PARAM_DTYPES),
    "model.matmul_precision": ("auto", *MATMUL_PRECISIONS),
    "model.sampling_layout": SAMPLING_LAYOUTS,
    "model.remat": REMATS,
    "data.too_long": ("refuse", "drop"),
    "environment.tool_format": ("auto", *FORMATS),
    "selection.strategy": tuple(STRATEGIES),
    "ratings.system": tuple(SYSTEMS),
    "evolution.form": tuple(EDITORS),
    "evolution.output": OUTPUTS,
    "deployment.rule": RULES,
    "reflection.reflector": REFLECTORS,
    "reflection.policy": ("reference", "current"),
    "reflection.problems": REFLECTED_PROBLEMS,
    "reflection.stages": (3, 1),
    "reflection.reasoning": REASONINGS,
    "reflection.format": ("auto", *EDIT_FORMATS),
    "loss.kind": LOSSES,
    "loss.aggregation": AGGREGATIONS,
    "loss.baseline": BASELINES,
    "loss.normalize_advantages": NORMALIZATIONS,
    "loss.kl_estimator": ("exact", *KL_ESTIMATORS),
    "loss.sampler_routing": ROUTINGS,
    "sampling.cache_dtype": CACHE_DTYPES,
    "optimizer.kind": OPTIMIZERS,
    "optimizer.schedule": SCHEDULES,
    "resume.changed_inputs": ("refuse", "allow"),
    "compile_ahead": ("auto", "on", "off"),
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
    **dict.fromkeys(("reflection.max_problems", "reflection.max_attempts", "reflection.verbatim_chars"), 0),
    "reflection.rejected_edits": 0,
    "reflection.reasoning_tokens": 1,
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
    "report.every": 0,
    **dict.fromkeys((f"environment.search.{name}" for name in SEARCH_LIMITS), 1),
    "environment.search.timeout": 1,
    "environment.math.timeout": 0.1,
    "environment.math.workers": 1,
    "environment.math.memory_mib": 256,
}


def check_config(config: Config, files: bool = True) -> None:
    """Checks every field, and fields against each other. ml_collections already rejects unknown fields.

    Args:
      config: the run's configuration, made from `configs/common.py`.
      files: whether to require data.train, and that all files exist.

    Raises:
      ValueError: naming the field, its value and the fix.
    """
    given = _flat(config)
    for field, choices in _CHOICES.items():
        if given[field] not in choices:
            raise ValueError(f"{field}={given[field]!r}: choose one of {', '.join(map(str, choices))}")
    for field, least in _AT_LEAST.items():
        if not given[field] >= least:
            raise ValueError(f"{field}={given[field]!r}: must be at least {least}")
    if files:
        check_files(config)
    check_groups(config)


def _flat(config: Config, prefix: str = "") -> dict[str, Any]:
    fields = {}
    for name, value in config.items():
        group = isinstance(value, Config)
        fields |= _flat(value, f"{prefix}{name}.") if group else {f"{prefix}{name}": value}
    return fields
