"""A look before a run: one problem, one answer, and what will be compiled. Nothing is trained or written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from espl_jax.assemble import (
    Parts,
    abstract_run_state,
    assemble,
    first_population,
    rollout_sizes,
    stream_key,
)
from espl_jax.data.order import Cursor, next_batch
from espl_jax.metrics import table
from espl_jax.rollout import collect_rollouts, conversation, encode_tree, stop_ids_of, train_batch
from espl_jax.sampling import decode
from espl_jax.sampling.buckets import pad_right
from espl_jax.sampling.generate import for_sampling, row_limits
from espl_jax.sampling.problem_blocks import ProblemBlocks
from espl_jax.sampling.sizes import describe
from espl_jax.text.chat import encode_conversation, render
from espl_jax.train import choose_prompts
from espl_jax.train_step import TrainState, policy_gradient_step, whole_params
from espl_jax.types import Problem, Rollouts, SystemPrompt, TrainBatch

LONGEST_ANSWER = 256
"""New tokens of the answer shown, at most: enough to see what the model does, on any machine."""

Say = Callable[[str], None]


def dry_run(config: Any, console: Console | None = None) -> None:
    """Shows what the first iteration would begin with, and the memory that its programs need.

    Args:
      config: a ConfigDict that `check_config` has passed.
      console: where to show it; standard output by default.

    Raises:
      ValueError: as a run would, also where prompt and answer could outgrow the model.
    """
    console = console or Console()
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    parts = assemble(config)
    rng = np.random.default_rng([config.seed, 1])
    prompts = choose_prompts(first_population(config), parts, config, rng)
    problems, _ = next_batch(parts.splits["train"], Cursor(config.seed), config.batch_size)
    show_problem(parts, prompts[0], problems[0], say)
    show_answer(parts, prompts[0], problems[0], config, say)
    show_programs(parts, prompts, problems, config, say)


def show_problem(parts: Parts, prompt: SystemPrompt, problem: Problem, say: Say) -> None:
    """The text of one conversation, and its tokens by level of the prefix tree."""
    tokenizer, kwargs = parts.reference.tokenizer, parts.sampling["chat_template_kwargs"]
    messages = conversation(prompt, problem, parts.environment)
    system, rest = encode_conversation(tokenizer, messages, **kwargs)
    say(f"Problem {problem.id} under prompt {prompt.id}, as the model gets it:\n")
    say(render(tokenizer, messages, **kwargs))
    say(f"\n--- system level: {len(system)} tokens, run once for each prompt")
    say(_pieces(tokenizer, system))
    say(f"--- problem level: {len(rest)} tokens, run once for each prompt and problem")
    say(_pieces(tokenizer, rest))


def _pieces(tokenizer: Any, tokens: Sequence[int]) -> str:
    return "  ".join(f"{token} {tokenizer.decode([token])!r}" for token in tokens)


def show_answer(parts: Parts, prompt: SystemPrompt, problem: Problem, c: Any, say: Say) -> None:
    """One answer, sampled and graded as in a run."""
    rollouts = collect_rollouts(
        parts.reference,
        [prompt],
        [problem],
        parts.environment,
        key=stream_key(c.seed, "train", 1),
        group_size=1,
        max_new_tokens=min(c.sampling.max_new_tokens, LONGEST_ANSWER),
        temperature=c.sampling.temperature,
        **parts.sampling,
        **parts.rollouts,
    )
    place = (0, 0, 0)
    tokens = rollouts.tokens[place][: rollouts.lengths[place]]
    end = "cut off there" if rollouts.truncated[place] else "ended by itself"
    say(f"--- the model's turn: {len(tokens)} tokens, {end}")
    say(_pieces(parts.reference.tokenizer, tokens.tolist()))
    say(f"\nReply as graded: {rollouts.replies[0][0][0]!r}")
    verdict = "right" if rollouts.success[place] else "wrong"
    say(
        f"Answer read: {rollouts.answers[0][0][0]!r}, correct answer: {problem.answer!r}, "
        f"{verdict}, reward {rollouts.rewards[place]:g}\n"
    )


def show_programs(
    parts: Parts, prompts: Sequence[SystemPrompt], problems: Sequence[Problem], c: Any, say: Say
) -> None:
    """Shapes and memory of the programs of the first iteration, compiled for the devices at hand."""
    state, model = abstract_run_state(c, parts), parts.reference
    say(f"Params: {_size(_bytes(model.params))} as {model.config.param_dtype}.")
    if state is not None:
        what = f"adapters of rank {c.lora.rank}" if parts.lora else "all weights"
        sizes = _size(_bytes(state.trainable)), _size(_bytes(state.opt_state))
        say(f"Trained: {what}, {sizes[0]} as float32, and an optimizer state of {sizes[1]}.")
    rows = [["program", "shape", "arguments", "temporaries", "outputs"]]
    for name, shape, compiled in programs(parts, state, prompts, problems, c, say):
        memory = compiled.memory_analysis()
        sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes)
        rows.append([name, shape, *map(_size, sizes)])
    say("\nMemory of one device; what a program is given and what it returns may be the same memory:\n")
    say(table(rows))


def programs(
    parts: Parts,
    state: TrainState | None,
    prompts: Sequence[SystemPrompt],
    problems: Sequence[Problem],
    c: Any,
    say: Say,
) -> Iterator[tuple[str, str, Any]]:
    """Name, shape and compiled form of prefill, of the largest decode chunk, and of a full update."""
    m, b, n = len(prompts), len(problems), c.group_size * c.num_prompts // len(prompts)
    model, most = parts.reference, c.sampling.max_new_tokens
    kwargs = parts.sampling["chat_template_kwargs"]
    tree = encode_tree(model.tokenizer, prompts, problems, parts.environment, kwargs)
    context = parts.rollouts["context_limit"] or model.config.max_positions
    row_limits(*tree, most, (m, b, n), context)
    params = model.params if state is None else whole_params(state.trainable, parts.frozen)
    params, config = for_sampling(params, model.config)
    mesh, stages = parts.mesh, rollout_sizes(c, parts)
    say(f"Rollouts: {describe(stages)}.")

    prompt_tokens = pad_right(tree[0])
    lowered = decode.prefill.lower(params, config, *prompt_tokens, mesh=mesh)
    prefill = lowered.compile()
    yield "prefill, prompts", f"{m} x {prompt_tokens[0].shape[1]} tokens", prefill
    system = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        lowered.out_info,
        prefill.output_shardings,
    )
    blocks = ProblemBlocks(tree[1], stages[0].problem_widths, mesh)
    problem_tokens = blocks.padded(0)
    lowered = decode.prefill.lower(params, config, *problem_tokens, system, mesh=mesh)
    shape = " x ".join(map(str, problem_tokens[0].shape))
    yield "prefill, a block of problems", f"{shape} tokens", lowered.compile()
    for number, sizes in enumerate(stages, 1):
        lowered = decode.decode_chunk.lower(
            params,
            config,
            system,
            decode.abstract_slots(config, sizes.slots, sizes.capacity, mesh),
            decode.abstract_rows(sizes.slots, mesh),
            jnp.asarray(stop_ids_of(model), jnp.int32),
            jnp.float32(1.0),
            columns=sizes.columns[-1],
            steps=sizes.steps,
            greedy=c.sampling.temperature == 0,
            truncation=parts.rollouts["truncation"],
            # As chunks are where nothing has ended yet.
            aligned=m == 1 or (sizes.parts == 1 and sizes.slots == m * b * n),
            mesh=mesh,
        )
        name = "decode chunk, largest" + (f" of stage {number}" if len(stages) > 1 else "")
        yield name, f"{sizes.slots} rows x {sizes.columns[-1]} columns", lowered.compile()

    if state is None:
        return
    truncated = bool(parts.rollouts["truncation"])
    batch = full_batch(tree, prompts, problems, n, c, truncated)
    step = policy_gradient_step.lower(*parts.step_arguments(state, batch), **parts.loss)
    shape = " x ".join(map(str, batch.inputs.shape)) + " new tokens"
    yield "policy-gradient step", shape, step.compile()


def full_batch(
    tree: Any,
    prompts: Sequence[SystemPrompt],
    problems: Sequence[Problem],
    group_size: int,
    c: Any,
    truncated: bool,
) -> TrainBatch:
    """Shapes of an update in which every group is mixed and every rollout as long as it may be."""
    shape, most = (len(prompts), len(problems), group_size), c.sampling.max_new_tokens
    flags, numbers = np.zeros(shape, bool), np.zeros(shape, np.float32)
    columns = np.zeros((*shape, most), np.float32)
    rollouts = Rollouts(
        prompts=tuple(prompts),
        problems=tuple(problems),
        system_tokens=tree[0],
        problem_tokens=tree[1],
        tokens=columns.astype(np.int32),
        lengths=np.full(shape, most, np.int32),
        drawn=columns == 0,
        logprobs=columns,
        untruncated_logprobs=columns,
        cutoffs=columns if truncated else columns - np.inf,
        temperature=c.sampling.temperature,
        truncated=flags,
        replies=(),
        answers=(),
        rewards=numbers,
        success=flags,
    )
    batch = train_batch(rollouts, numbers + 1, max(1, c.loss.microbatch_rows // group_size))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
