"""Curves of a run, what it cost, and how its reflection went."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

from espl_jax.evolution.edits import REASONS
from espl_jax.report.read import Record, RunLogs
from espl_jax.rollouts.evaluation import pass_at_k

Curve = list[float | None]
"""One value for each iteration; None where there is none."""


def group_rates(rollouts: Sequence[Record]) -> dict[str, float]:
    """Returns pass@k of an iteration's training rollouts, for k = 1, 2, 4 ... and the group size.

    The rollouts of a slot on a problem are a group, so copies of a prompt do not make larger ones.
    """
    groups: dict[tuple[int, str], list[bool]] = collections.defaultdict(list)
    for each in rollouts:
        groups[each["slot"], each["problem"]].append(bool(each["success"]))
    size = min(map(len, groups.values()), default=0)
    ks = sorted({2**i for i in range(size.bit_length())} | {size}) if size else []
    return {
        str(k): math.fsum(pass_at_k(sum(group), len(group), k) for group in groups.values()) / len(groups)
        for k in ks
    }


def curves(run: RunLogs, rates: Mapping[int, Mapping[str, float]], lengths: Mapping[int, int]) -> Any:
    """Returns the curves of a run.

    Args:
      run: the run.
      rates: iteration -> k -> pass@k of the training rollouts.
      lengths: iteration -> tokens of the longest rollout.

    Returns:
      `iterations`; `charts`, of `key`, `title`, `unit` and `lines` (name -> Curve), with `bands` (name ->
      [low, high] of a line) where there are intervals.
    """
    metrics = run.metrics
    iterations = [each["iteration"] for each in metrics]
    ks = sorted({k for each in rates.values() for k in each}, key=int)
    shown = ks if len(ks) <= 3 else [ks[0], ks[len(ks) // 2], ks[-1]]

    def line(name: str) -> Curve:
        return [_number(each.get(name)) for each in metrics]

    rewards, success = line("reward"), line("success")
    validated = [each.get("validation") or {} for each in metrics]
    valid_ks = sorted({k for each in validated for k in each.get("pass_at", {})}, key=int)
    found = [
        _chart(
            "reward",
            "Mean reward",
            "",
            {"reward": rewards} | ({} if success == rewards else {"success rate": success}),
        ),
        _chart(
            "validation",
            "Validation accuracy",
            "",
            {"accuracy": [_number(each.get("accuracy")) for each in validated]},
            {
                "accuracy": [
                    [_number(each.get("low")) for each in validated],
                    [_number(each.get("high")) for each in validated],
                ]
            },
        ),
        _chart(
            "pass",
            "pass@k of the training rollouts",
            "",
            {f"pass@{k}": [_number(rates.get(i, {}).get(k)) for i in iterations] for k in shown},
        ),
        _chart(
            "valid_pass",
            "pass@k on validation",
            "",
            {
                f"pass@{k}": [_number(each.get("pass_at", {}).get(k)) for each in validated]
                for k in (valid_ks if len(valid_ks) > 1 else ())
            },
        ),
        _chart("entropy", "Entropy", "nats per token", {"entropy": line("entropy")}),
        _chart("kl", "KL to the reference", "nats per token", {"KL": line("kl")}),
        _chart("clip", "Clip fraction", "of tokens", {"clipped": line("clip_fraction")}),
        _chart(
            "gap", "Gap of sampler and trainer", "mean |log ratio|", {"|log ratio|": line("log_ratio_abs")}
        ),
        _chart(
            "experts",
            "Load of the experts",
            "relative to an even load",
            {"busiest": line("expert_load_max"), "least busy": line("expert_load_min")},
        ),
        _chart("routers", "Entropy of the routers", "nats per token", {"entropy": line("router_entropy")}),
        _chart(
            "routing",
            "Experts on which sampler and trainer disagree",
            "fraction of choices",
            {"disagreements": line("routing_disagreements")},
        ),
        _chart("norm", "Gradient norm", "before clipping", {"norm": line("grad_norm")}),
        _chart(
            "lengths",
            "Length of rollouts",
            "tokens",
            {"mean": line("new_tokens"), "longest": [_number(lengths.get(i)) for i in iterations]},
        ),
        _chart("truncated", "Truncated rollouts", "fraction", {"truncated": line("truncated")}),
        _chart(
            "mixed",
            "Groups with unequal rewards",
            "fraction",
            {"mixed": [_ratio(each.get("mixed_groups"), each.get("groups")) for each in metrics]},
        ),
    ]
    return {"iterations": iterations, "charts": found}


def times(run: RunLogs) -> dict[str, Any]:
    """Returns the seconds of each phase by iteration; `other` is the rest of the total."""
    skipped = {"total", "reflection_total", "reflection_hidden"}
    names = list(
        dict.fromkeys(name for each in run.metrics for name in each.get("time", {}) if name not in skipped)
    )
    phases = {name: [float(each["time"].get(name, 0.0)) for each in run.metrics] for name in names}
    totals = [float(each.get("time", {}).get("total", 0.0)) for each in run.metrics]
    known = [math.fsum(values) for values in zip(*phases.values(), strict=True)] or [0.0] * len(totals)
    phases["other"] = [max(0.0, total - part) for total, part in zip(totals, known, strict=True)]
    return {"iterations": [each["iteration"] for each in run.metrics], "phases": phases, "total": totals}


def reflection_health(run: RunLogs, replies: Mapping[int, Mapping[str, int]]) -> dict[str, Any]:
    """Returns what became of the reflector's replies and edits, by iteration and in total.

    Args:
      run: the run.
      replies: iteration -> `usable`, `cut_off`, `missing`.
    """
    iterations = [each["iteration"] for each in run.metrics]
    accepted = collections.Counter({i: 0 for i in iterations})
    for each in run.births:
        if each["event"] == "born":
            accepted[each["at"]] += len(each["edits"])
    drops: collections.Counter[str] = collections.Counter()
    no_child: collections.Counter[str] = collections.Counter()
    for each in run.metrics:
        drops.update(each.get("drops", {}))
        no_child.update(f"{operator}: {why}" for operator, why in each.get("no_child", {}).items())

    def by_iteration(reason: str) -> list[int]:
        return [each.get("drops", {}).get(reason, 0) for each in run.metrics]

    kinds = ("usable", "cut_off", "missing")
    return {
        "iterations": iterations,
        "replies": {kind: [replies.get(i, {}).get(kind, 0) for i in iterations] for kind in kinds},
        "accepted": [accepted[i] for i in iterations],
        "dropped": {reason: by_iteration(reason) for reason in sorted(drops) if reason in REASONS},
        "events": {reason: by_iteration(reason) for reason in sorted(drops) if reason not in REASONS},
        "children": [len(each.get("children", [])) for each in run.metrics],
        "no_child": dict(sorted(no_child.items())),
    }


def count_replies(transcripts: Sequence[Record]) -> dict[str, int]:
    """Counts usable, cut off and missing replies of an iteration."""
    counts = collections.Counter(
        "missing" if each["reply"] is None else "usable" if each.get("ended", True) else "cut_off"
        for each in transcripts
    )
    return dict(counts)


def _chart(
    key: str, title: str, unit: str, lines: dict[str, Curve], bands: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns a chart without the lines that have no value."""
    kept = {name: values for name, values in lines.items() if any(value is not None for value in values)}
    bands = {name: band for name, band in (bands or {}).items() if name in kept}
    return {"key": key, "title": title, "unit": unit, "lines": kept, "bands": bands}


def _number(value: Any) -> float | None:
    return None if value is None else round(float(value), 6)


def _ratio(part: Any, whole: Any) -> float | None:
    return round(part / whole, 6) if part is not None and whole else None
