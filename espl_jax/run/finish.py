"""Which prompt to deploy, and how it does on problems that nothing was chosen on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from espl_jax.console.progress import Progress
from espl_jax.console.tables import table
from espl_jax.evolution.deployment import Choice, best_validated, deployed
from espl_jax.evolution.lineage import lineage_text, members_of
from espl_jax.evolution.population import Population
from espl_jax.pretrained.load import Pretrained
from espl_jax.rollouts.collect import collect_rollouts
from espl_jax.rollouts.evaluation import Evaluation, summarize
from espl_jax.rollouts.keys import stream_key
from espl_jax.rollouts.records import records
from espl_jax.run.parts import Parts
from espl_jax.storage.workdir import WorkDir
from espl_jax.types import SystemPrompt


def finish(
    parts: Parts,
    policy: Pretrained,
    root: SystemPrompt,
    population: Population,
    c: Any,
    workdir: WorkDir,
    progress: Progress,
) -> dict[str, Any]:
    """The end of a run: the choice of the prompt to deploy, the test, and the lineage as text.

    The test is {initial, trained weights} x {root, deployed prompt}. It and the choice with its reason are
    shown and written to `results.json`, the lineage to `lineage.txt`.

    Args:
      parts: of the run.
      policy: the model with the trained weights.
      root: the oldest of the first prompts.
      population: the population now.
      c: the config.
      workdir, progress: of the run.
    """
    best, reason = choose(parts, policy, population, c, workdir, progress)
    prompts = {"root": root} if best.id == root.id else {"root": root, "deployed": best}
    weights = {"initial": parts.reference} | ({"trained": policy} if parts.trains else {})
    results: dict[str, Any] = {
        "iteration": c.num_iterations,
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
                cells = evaluate_on(parts, "test", model, name, members, c, c.num_iterations, workdir)
            rows.append([name, *map(str, cells)])
            results["test"][name] = dict(zip(prompts, map(dataclasses.asdict, cells), strict=True))
        problems, samples = len(parts.splits["test"]), c.evaluation.test_samples
        progress.say(f"\nTest accuracy, {problems} problems, {samples} samples each, with 95% intervals:\n")
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
    progress.say(f"Best prompt: {best.id}, rating {best.mu:.2f} ± {best.sigma:.2f}, made by {best.operator}")
    progress.say(f"    ({reason})")
    progress.say(
        "\n".join("    " + line for line in (best.render() or "(empty: the template's default)").splitlines())
    )
    progress.say(
        f"Written to {workdir.path}: results.json, population.json, lineage.txt, checkpoints, and the logs "
        "*.jsonl"
    )
    return results


def choose(
    parts: Parts, policy: Pretrained, population: Population, c: Any, workdir: WorkDir, progress: Progress
) -> Choice:
    """The prompt to deploy, by the config's rule; with `validation` the candidates are sampled for it."""
    if c.deployment.rule != "validation" or not parts.evolves:
        return deployed(population, c.mode, c.deployment)

    def validate(members: Sequence[SystemPrompt]) -> list[float]:
        with progress.phase("validation of candidates"):
            cells = evaluate_on(
                parts, "validation", policy, "deployment", members, c, c.num_iterations, workdir
            )
        return [cell.reward for cell in cells]

    return best_validated(population, validate, c.deployment.candidates)


def evaluate_on(
    parts: Parts,
    split: str,
    model: Pretrained,
    weights: str,
    prompts: Sequence[SystemPrompt],
    c: Any,
    iteration: int,
    workdir: WorkDir,
) -> list[Evaluation]:
    """Evaluates prompts on `validation` or `test`, and logs every rollout under the name of the weights."""
    rollouts = collect_rollouts(
        model,
        prompts,
        parts.splits[split].problems,
        parts.environment,
        key=stream_key(c.seed, split, iteration),
        group_size=c.evaluation[f"{split}_samples"],
        max_new_tokens=c.sampling.max_new_tokens,
        temperature=c.evaluation.temperature,
        **parts.sampling,
        **parts.rollouts,
    )
    for record in records(rollouts):
        workdir.append("evaluations", {"iteration": iteration, "split": split, "weights": weights, **record})
    return summarize(rollouts)
