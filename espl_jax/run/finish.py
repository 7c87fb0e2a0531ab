"""The end of a run: chooses the prompt to deploy and evaluates it on the test set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from espl_jax.console.tables import table
from espl_jax.evolution.deployment import Choice, best_validated, deployed
from espl_jax.evolution.lineage import lineage_text, members_of
from espl_jax.evolution.population import Population
from espl_jax.pretrained.load import Pretrained
from espl_jax.rollouts.collect import collect_rollouts
from espl_jax.rollouts.evaluation import Evaluation, summarize
from espl_jax.rollouts.keys import stream_key
from espl_jax.rollouts.records import records
from espl_jax.run.job import Job
from espl_jax.types import SystemPrompt


def finish(job: Job, policy: Pretrained, root: SystemPrompt, population: Population) -> dict[str, Any]:
    """Chooses the prompt to deploy, runs the test, and writes `results.json` and `lineage.txt`.

    The test covers {initial, trained weights} x {root, deployed prompt}. The results, the chosen prompt and
    the reason for the choice are also printed.

    Args:
      job: the run.
      policy: the model with the trained weights.
      root: the oldest of the initial prompts.
      population: the final population.

    Returns:
      The contents of `results.json`.
    """
    config, parts, workdir, progress = job.config, job.parts, job.workdir, job.progress
    best, reason = choose(job, policy, population)
    prompts = {"root": root} if best.id == root.id else {"root": root, "deployed": best}
    weights = {"initial": parts.reference} | ({"trained": policy} if parts.trains else {})
    results: dict[str, Any] = {
        "iteration": config.num_iterations,
        "deployed": dataclasses.asdict(best),
        "reason": reason,
        "problems_left_out": {split: len(ids) for split, ids in parts.left_out.items()},
        "test": {},
    }
    if "test" in parts.splits:
        rows = [["weights", *(f"{name} prompt ({prompt.id})" for name, prompt in prompts.items())]]
        for name, model in weights.items():
            with progress.phase(f"test, {name} weights"):
                members = list(prompts.values())
                cells = evaluate_on(job, "test", model, name, members, config.num_iterations)
            rows.append([name, *map(str, cells)])
            results["test"][name] = dict(zip(prompts, map(dataclasses.asdict, cells), strict=True))
        problems, samples = len(parts.splits["test"]), config.evaluation.test_samples
        progress.say(
            f"\nTest accuracy, {problems} problems, samples of each: {samples}, with 95% intervals:\n"
        )
        progress.say(table(rows))
        before, after = (
            results["test"]["initial"]["root"],
            results["test"][list(weights)[-1]][list(prompts)[-1]],
        )
        progress.say(f"\nTest accuracy: {Evaluation(**before)} before, {Evaluation(**after)} after.")
    workdir.write_json("results.json", results)
    members = members_of(workdir.read("lineage"), population.members)
    workdir.write_text(
        "lineage.txt", lineage_text(members, [each.id for each in population.members], best.id)
    )
    origin = f"created by {best.operator}" if best.parents else "an initial prompt"
    progress.say(f"Best prompt: {best.id}, rating {best.mu:.2f} ± {best.sigma:.2f}, {origin}")
    progress.say(f"    ({reason})")
    progress.say(
        "\n".join("    " + line for line in (best.render() or "(empty: the template's default)").splitlines())
    )
    progress.say(
        f"Written to {workdir.path}: report.html, results.json, population.json, lineage.txt, checkpoints "
        "and logs (*.jsonl)"
    )
    return results


def choose(job: Job, policy: Pretrained, population: Population) -> Choice:
    """Returns the prompt to deploy by `deployment.rule`; `validation` samples rollouts of the candidates."""
    config = job.config
    if config.deployment.rule != "validation" or not job.parts.evolves:
        return deployed(population, config.mode, config.deployment)

    def validate(members: Sequence[SystemPrompt]) -> list[float]:
        with job.progress.phase("validation of candidates"):
            cells = evaluate_on(job, "validation", policy, "deployment", members, config.num_iterations)
        return [cell.reward for cell in cells]

    return best_validated(population, validate, config.deployment.candidates)


def evaluate_on(
    job: Job,
    split: str,
    model: Pretrained,
    weights: str,
    prompts: Sequence[SystemPrompt],
    iteration: int,
) -> list[Evaluation]:
    """Evaluates prompts on `validation` or `test`, and logs every rollout with the name `weights`."""
    config, parts = job.config, job.parts
    rollouts = collect_rollouts(
        model,
        prompts,
        parts.splits[split].problems,
        parts.environment,
        key=stream_key(config.seed, split, iteration),
        group_size=config.evaluation[f"{split}_samples"],
        sampling=dataclasses.replace(parts.sampling, temperature=config.evaluation.temperature),
        chat=parts.chat,
        capacity=parts.capacity,
    )
    for record in records(rollouts):
        named = {"iteration": iteration, "split": split, "weights": weights, **record}
        job.workdir.append("evaluations", named)
    return summarize(rollouts)
