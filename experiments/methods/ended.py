"""Measures runs that have ended: the KL divergence of their weights, and their accuracy under other prompts.

    python -m experiments.methods.ended kl WORKDIR
    python -m experiments.methods.ended test WORKDIR PROMPT.json

Prints JSON. `compare_methods` starts it as a separate process, so that no model stays in memory between runs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from espl_jax.console import command_line
from espl_jax.models import lora
from espl_jax.models.config import DecoderConfig
from espl_jax.models.transformer import Params, logits
from espl_jax.rollouts.collect import collect_rollouts
from espl_jax.rollouts.encode import encode_tree
from espl_jax.rollouts.keys import stream_key
from espl_jax.run.parts import chat_format, sampling_of
from espl_jax.run.saved import read_run
from espl_jax.run.tasks import environment_of, load_splits
from espl_jax.run.weights import load_reference
from espl_jax.types import SystemPrompt

BATCH = 8


def kl_to_initial(workdir: Path, problems: int = 32) -> float:
    """Returns KL(trained || initial) of a run in nats per token, over the whole vocabulary.

    The mean is over the tokens of the replies to the first test problems under the root prompt, as the
    trained weights gave them in the run's test.

    Args:
      workdir: of a run that trained weights and has ended, with a test.
      problems: at most this many of the test.
    """
    run = read_run(workdir)
    config, tokenizer = run.config, run.model.tokenizer
    initial = (
        load_reference(config, None).params if run.adapters is None else lora.detach(run.model.params)[0]
    )
    tested = load_splits(config)["test"].problems[:problems]
    arguments = json.loads(config.model.chat_template_kwargs)
    (system,), (rests,) = encode_tree(tokenizer, [run.root], tested, environment_of(config), arguments)
    replies: dict[str, list[int]] = {}
    with (workdir / "evaluations.jsonl").open(encoding="utf-8") as file:
        for each in map(json.loads, file):
            if (each["split"], each["weights"], each["prompt"]) == ("test", "trained", run.root.id):
                replies.setdefault(each["problem"], each["tokens"])
    pairs = [([*system, *rest], replies[problem.id]) for rest, problem in zip(rests, tested, strict=True)]
    width = max(len(prompt) + len(reply) for prompt, reply in pairs)
    total, count = 0.0, 0
    for start in range(0, len(pairs), BATCH):
        tokens, drawn = np.zeros((BATCH, width), np.int32), np.zeros((BATCH, width), bool)
        for row, (prompt, reply) in enumerate(pairs[start : start + BATCH]):
            tokens[row, : len(prompt) + len(reply)] = prompt + reply
            drawn[row, len(prompt) - 1 : len(prompt) + len(reply) - 1] = True
        total += float(_summed_kl(run.model.params, initial, run.model.config, tokens, drawn))
        count += int(drawn.sum())
    return total / count


@functools.partial(jax.jit, static_argnames="decoder")
def _summed_kl(
    params: Params, initial: Params, decoder: DecoderConfig, tokens: np.ndarray, drawn: np.ndarray
) -> jax.Array:
    """The sum of KL(params || initial) over the positions `drawn`, bool [R, T], of `tokens`, int32 [R, T]."""
    ours, theirs = (jax.nn.log_softmax(logits(each, decoder, tokens)) for each in (params, initial))
    return jnp.sum(jnp.sum(jnp.exp(ours) * (ours - theirs), axis=-1), where=drawn)


def test_under(workdir: Path, prompt: SystemPrompt) -> dict[str, float]:
    """Returns success rates of a run's weights under a prompt, by problem of the run's test set."""
    run = read_run(workdir)
    config = run.config
    rollouts = collect_rollouts(
        run.model,
        [prompt],
        load_splits(config)["test"].problems,
        environment_of(config),
        key=stream_key(config.seed, "test", config.num_iterations),
        group_size=config.evaluation.test_samples,
        sampling=dataclasses.replace(sampling_of(config), temperature=config.evaluation.temperature),
        chat=chat_format(config),
    )
    rates = rollouts.success[0].mean(axis=1).tolist()
    return {problem.id: rate for problem, rate in zip(rollouts.problems, rates, strict=True)}


def main() -> None:
    """Prints what the arguments ask for."""
    command_line.use_compilation_cache("~/.cache/espl_jax/xla")
    what, workdir, *prompt = sys.argv[1:]
    if what == "kl":
        print(json.dumps(kl_to_initial(Path(workdir))))
    else:
        print(json.dumps(test_under(Path(workdir), SystemPrompt(**json.loads(Path(prompt[0]).read_text())))))


if __name__ == "__main__":
    main()
