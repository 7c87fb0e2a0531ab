"""`--dry_run`: shows a problem, a rollout and the programs of a run. Nothing is trained or written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from rich.console import Console

from espl_jax.console.tables import table
from espl_jax.data.order import Cursor
from espl_jax.parallel import processes
from espl_jax.plan import programs
from espl_jax.plan.programs import Program
from espl_jax.rollouts.collect import collect_rollouts
from espl_jax.rollouts.encode import conversation, encode_tree, stop_ids_of
from espl_jax.rollouts.keys import stream_key
from espl_jax.run.config import Config
from espl_jax.run.context import check_first_prompts, context_of
from espl_jax.run.parts import Parts, abstract_run_state, assemble, workloads_of
from espl_jax.run.roots import first_population
from espl_jax.run.weights import settle_numerics
from espl_jax.run.workloads import Lengths
from espl_jax.sampling.generate import row_limits
from espl_jax.sampling.programs import describe
from espl_jax.text.chat import encode_conversation, render
from espl_jax.train import choose, left_out
from espl_jax.types import Problem, SystemPrompt

LONGEST_ANSWER = 256
"""Maximum new tokens of the rollout shown: enough to see what the model does, and fast on any machine."""

Say = Callable[[str], None]


def dry_run(config: Config, console: Console | None = None) -> None:
    """Shows the inputs of the first iteration and the memory that its programs need.

    Args:
      config: the run's configuration; must have passed `check_config`.
      console: console to print to; standard output by default.

    Raises:
      ValueError: as a run would, and if prompt and rollout could exceed the context of the model.
    """
    console = (console or Console()) if processes.is_first() else Console(quiet=True)
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    config = settle_numerics(config)
    parts = assemble(config)
    population = first_population(config)
    check_first_prompts(population, config, parts.splits, parts.reference, parts.environment)
    prompts, problems, *_ = choose(population, Cursor(config.seed), 1, parts, config)
    for line in left_out(parts):
        say(line)
    show_problem(parts, prompts[0], problems[0], say)
    show_answer(parts, prompts[0], problems[0], config, say)
    show_programs(parts, prompts, problems, config, say)


def show_problem(parts: Parts, prompt: SystemPrompt, problem: Problem, say: Say) -> None:
    """Prints the text of a conversation, and its tokens by level of the prefix tree."""
    tokenizer, kwargs = parts.reference.tokenizer, parts.chat.template_arguments
    messages, kwargs = conversation(tokenizer, prompt, problem, parts.environment, kwargs)
    system, rest = encode_conversation(tokenizer, messages, **kwargs)
    say(f"Problem {problem.id} under prompt {prompt.id}, as given to the model:\n")
    say(render(tokenizer, messages, **kwargs))
    say(f"\n--- system level: {len(system)} tokens, run once for each prompt")
    say(_pieces(tokenizer, system))
    say(f"--- problem level: {len(rest)} tokens, run once for each prompt and problem")
    say(_pieces(tokenizer, rest))


def _pieces(tokenizer: Any, tokens: Sequence[int]) -> str:
    return "  ".join(f"{token} {tokenizer.decode([token])!r}" for token in tokens)


def show_answer(parts: Parts, prompt: SystemPrompt, problem: Problem, config: Config, say: Say) -> None:
    """Prints a rollout, sampled and graded as in a run."""
    rollouts = collect_rollouts(
        parts.reference,
        [prompt],
        [problem],
        parts.environment,
        key=stream_key(config.seed, "train", 1),
        group_size=1,
        sampling=dataclasses.replace(
            parts.sampling, max_new_tokens=min(config.sampling.max_new_tokens, LONGEST_ANSWER)
        ),
        chat=parts.chat,
        capacity=parts.capacity,
    )
    place = (0, 0, 0)
    tokens = rollouts.tokens[place][: rollouts.lengths[place]]
    end = "truncated" if rollouts.truncated[place] else "ended by the model"
    say(f"--- the model's turn: {len(tokens)} tokens, {end}")
    say(_pieces(parts.reference.tokenizer, tokens.tolist()))
    say(f"\nReply as graded: {rollouts.replies[0][0][0]!r}")
    verdict = "right" if rollouts.success[place] else "wrong"
    say(
        f"Answer read: {rollouts.answers[0][0][0]!r}, correct answer: {problem.answer!r}, "
        f"{verdict}, reward {rollouts.rewards[place]:g}\n"
    )


def show_programs(
    parts: Parts, prompts: Sequence[SystemPrompt], problems: Sequence[Problem], config: Config, say: Say
) -> None:
    """Compiles the programs of the first iteration for the local devices, and prints shapes and memory."""
    model = parts.reference
    state = abstract_run_state(config, model.config, parts.optimizer, parts.mesh)
    say(f"Params: {_size(_bytes(model.params))} as {model.config.param_dtype}.")
    if state is not None:
        what = f"adapters of rank {config.lora.rank}" if parts.lora else "all weights"
        sizes = _size(_bytes(state.trainable)), _size(_bytes(state.opt_state))
        say(f"Trained: {what}, {sizes[0]} as float32, and an optimizer state of {sizes[1]}.")
    rows = [["program", "shape", "arguments", "temporaries", "outputs"]]
    later: dict[str, list[str]] = {}
    for program in programs_of(parts, prompts, problems, config, say):
        if program.phase not in ("rollouts", "update"):
            later.setdefault(program.phase, []).append(f"{program.name} ({program.shape})")
            continue
        memory = program.lower().compile().memory_analysis()
        assert memory is not None
        sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes)
        rows.append([program.name, program.shape, *map(_size, sizes)])
    say("\nMemory per device; outputs may alias arguments:\n")
    say(table(rows))
    for phase, named in later.items():
        say(f"\nFor {phase}, compiled when first needed (upper bounds): {'; '.join(named)}.")


def programs_of(
    parts: Parts, prompts: Sequence[SystemPrompt], problems: Sequence[Problem], config: Config, say: Say
) -> Iterator[Program]:
    """Yields all programs of the run, for prompts and problems as long as those of the first iteration.

    Of the decode chunks of a stage, it yields only the smallest and the largest.

    Raises:
      ValueError: if a prompt leaves no room for a reply.
    """
    model, most = parts.reference, config.sampling.max_new_tokens
    kwargs = parts.chat.template_arguments
    tree = encode_tree(model.tokenizer, prompts, problems, parts.environment, kwargs)
    row_limits(*tree, most, (len(prompts), len(problems), 1), context_of(config, model.config))
    longest = (max(map(len, tree[0])), max(len(tokens) for lane in tree[1] for tokens in lane))
    taken = parts.capacity.held_bytes
    assert taken is not None
    stages = {
        sampling: sampling.sizes(model.config, taken, parts.mesh)
        for sampling in workloads_of(config, parts, Lengths(*longest, most))
    }
    held = programs.held(
        config, model.config, parts.optimizer, parts.mesh, parts.reflector and parts.reflector.config
    )
    rollouts, sizes = next(iter(stages.items()))
    say(f"Rollouts: {describe(rollouts.shapes(model.config, held.policy, sizes, parts.mesh))}.")
    yield from programs.run_programs(
        config,
        model.config,
        held,
        parts.optimizer,
        stages,
        parts.mesh,
        stop_ids=len(stop_ids_of(model)),
        every_bucket=False,
    )


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
