"""Runs the evaluation that a command line asks for."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from espl_jax.console.tables import duration
from espl_jax.data.problems import ProblemSet
from espl_jax.environments.base import Dialogue, Environment, checked_grades
from espl_jax.evaluate.cells import Cell, make_cells, show
from espl_jax.evaluate.request import Request, naming
from espl_jax.parallel import sharding
from espl_jax.pretrained import hf_folder, peft
from espl_jax.pretrained.load import find_folder, find_gguf, is_gguf, load_pretrained
from espl_jax.pretrained.numerics import AUTO, CHOSEN
from espl_jax.rollouts.collect import collect_rollouts
from espl_jax.rollouts.encode import Model, conversation_lengths, longest_problem
from espl_jax.rollouts.keys import stream_key
from espl_jax.rollouts.records import records
from espl_jax.run.saved import check_run, is_run, read_config, read_run
from espl_jax.run.tasks import make_environment
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.sampling.truncation import Truncation
from espl_jax.storage import durable
from espl_jax.storage.workdir import plain
from espl_jax.text.chat import encode
from espl_jax.text.chat_format import ChatFormat
from espl_jax.types import Grade, Problem, Rollouts, SystemPrompt


def compare(request: Request) -> list[Cell]:
    """Evaluates every model under every prompt on every problem set, prints the results and writes the files.

    Each model is loaded once, and its prompts are sampled in the same batches. If an error occurs, the cells
    finished by then are still printed and written.

    Returns:
      The cells, ordered by model, problem set and prompt.

    Raises:
      ValueError: before sampling, for problems that the environment cannot grade and models that do not
        exist; otherwise as loading and sampling do.
    """
    with naming("environment", request.environment):
        environment = make_environment(
            request.environment,
            request.answer_format,
            request.instruction,
            request.options,
            request.reward,
            next(iter(request.problem_sets)),
        )
    for name, problem_set in request.problem_sets.items():
        if request.environment in ("math", "arithmetic"):
            with naming("data", name):
                check_gradable(environment, problem_set)
    with naming("mesh", ",".join(f"{axis}={size}" for axis, size in request.mesh.items())):
        mesh = sharding.make_mesh(request.mesh or None)
    for source in request.models:
        with naming("model", source):
            find_model(source)
    cells: list[Cell] = []
    try:
        for source in request.models:
            for cell in evaluate_model(source, request, environment, mesh):
                cells.append(cell)  # one by one, so that an error keeps the earlier cells
    finally:
        if cells:
            report(cells, request)
    return cells


def report(cells: Sequence[Cell], request: Request) -> None:
    """Prints the cells (at least one) and writes the `.json` files."""
    print(show(cells))
    print(f"\n{_footnote(request)}", flush=True)
    for path in request.out:
        if path.suffix == ".json":
            results = [dataclasses.asdict(cell) for cell in cells]
            saved = plain({"settings": settings(request), "results": results}, path.name)
            durable.replace(path, f"{json.dumps(saved, indent=2, ensure_ascii=False)}\n".encode())
        tell(f"written: {path}")


def find_model(source: str) -> None:
    """Checks a model by its small files; a model on the Hub is downloaded.

    Args:
      source: as for `load_model`.

    Raises:
      As `load_model`.
    """
    if is_run(source):
        find_model(check_run(source).model.source)
    elif is_gguf(source):
        find_gguf(source)
    else:
        folder = find_folder(source)
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            find_model(peft.base_of(folder))
        else:
            hf_folder.read_config(folder)


def check_gradable(environment: Environment | Dialogue, problem_set: ProblemSet) -> None:
    """Raises ValueError unless the gold answer of every problem, in a box, is graded as correct.

    A reward without success will do: the answer is right, and only lacks a unit, for example.
    """

    def right(grade: Grade) -> bool:
        return grade.success or grade.reward > 0

    problems = problem_set.problems
    grades = checked_grades(environment, problems, [rf"\boxed{{{problem.answer}}}" for problem in problems])
    wrong = [problem for problem, grade in zip(problems, grades, strict=True) if not right(grade)]
    if wrong:
        raise ValueError(
            f"the environment grades the gold answers of {len(wrong)} of {len(problems)} problems as wrong, "
            f"first that of {wrong[0].id}, {wrong[0].answer!r}; correct the data, or choose another "
            "--environment or --answer_format"
        )


def evaluate_model(
    source: str, request: Request, environment: Environment | Dialogue, mesh: jax.sharding.Mesh | None
) -> Iterator[Cell]:
    """Loads one model and yields its cells."""
    tell(f"{source}: loading")
    model = load_model(source, mesh, request.numerics)
    chat = chat_format(source, request.sampling)
    for name, problem_set in request.problem_sets.items():
        with naming("data", name):
            check_room(request, source, model, problem_set, environment, chat)
    for name, problem_set in request.problem_sets.items():
        tell(
            f"{source}, {name}: {len(problem_set)} problems, {len(request.prompts)} prompts, "
            f"{request.sampling['group_size']} samples each; the first batch takes longer, since it compiles"
        )
        batches = []
        start, done = time.monotonic(), 0
        for rollouts in sample_in_batches(
            model,
            tuple(request.prompts.values()),
            problem_set.problems,
            environment,
            request.batch_size,
            key=stream_key(request.seed, "evaluation", 0),
            group_size=request.sampling["group_size"],
            sampling=sampling_of(request.sampling),
            chat=chat,
            capacity=Capacity(max_rows=request.sampling["max_rows"], mesh=mesh),
        ):
            batches.append(rollouts)
            done += len(rollouts.problems)
            seconds = time.monotonic() - start
            left = seconds / done * (len(problem_set) - done)
            tell(
                f"{source}, {name}: {done} of {len(problem_set)} problems, mean reward of this batch "
                f"{rollouts.rewards.mean():.3f}, {duration(seconds)}, {duration(left)} left"
            )
            for path in request.out:
                if path.suffix == ".jsonl":
                    append(path, rollouts, source, tuple(request.prompts), name)
        yield from make_cells(batches, source, tuple(request.prompts), name)


def check_room(
    request: Request,
    source: str,
    model: Model,
    problem_set: ProblemSet,
    environment: Environment | Dialogue,
    chat: ChatFormat,
) -> None:
    """Raises ValueError if a prompt and a problem leave no room for a reply; the message names the problems.

    Args:
      request: gives the prompts and the context limit.
      source: source of the model, for messages.
      model, environment, chat: as for `collect_rollouts`.
      problem_set: the problems to check.
    """
    most = model.config.max_positions
    context, arguments = request.sampling["context_limit"] or most, chat.template_arguments
    problems = problem_set.problems
    for name, prompt in request.prompts.items():
        own = len(encode(model.tokenizer, prompt.render()))
        lengths = conversation_lengths(
            model.tokenizer, problems, environment, arguments, least=context - own, prompt=prompt
        )
        long = {id: length + own for id, length in lengths.items() if length + own >= context}
        if long:
            named = ", ".join(list(long)[:10]) + (f" and {len(long) - 10} more" if len(long) > 10 else "")
            raise ValueError(
                f"{len(long)} of {len(problems)} problems are too long ({named}): with prompt {name!r} the "
                f"longest has {max(long.values())} tokens, which leaves no room in a context of {context}; "
                f"raise --context_limit ({source} supports {most}), shorten the prompt, or leave them out"
            )


def load_model(source: str, mesh: jax.sharding.Mesh | None, numerics: Mapping[str, str]) -> Model:
    """Loads a model.

    Args:
      source: the work directory of a run, for its trained weights, or as for `load_pretrained`.
      mesh: mesh for the params.
      numerics: DecoderConfig fields; missing fields are those of the run, or chosen for the devices.

    Raises:
      As `read_run` and `load_pretrained`.
    """
    if is_run(source):
        return read_run(source, mesh, **numerics).model
    return load_pretrained(source, mesh=mesh, **dict.fromkeys(CHOSEN, AUTO) | dict(numerics))


def chat_format(source: str, given: Mapping[str, Any]) -> ChatFormat:
    """Returns the chat format: that of the run that the model comes from, overridden by `given`.

    Args:
      source: as for `load_model`.
      given: as `Request.sampling`; its `chat_template_kwargs` override those of the run.
    """
    arguments, show_thinking = {}, False
    if is_run(source):
        config = read_config(source)
        arguments = json.loads(config.model.chat_template_kwargs)
        show_thinking = config.environment.show_thinking
    if given["show_thinking"] is not None:
        show_thinking = given["show_thinking"]
    return ChatFormat(
        template_arguments=arguments | given["chat_template_kwargs"],
        show_thinking=show_thinking,
        tool_format=given["tool_format"],
        stop_strings=tuple(given["stop_strings"]),
    )


def sampling_of(given: Mapping[str, Any]) -> Sampling:
    """Returns the sampling settings, the same for all models."""
    return Sampling(
        max_new_tokens=given["max_new_tokens"],
        temperature=given["temperature"],
        truncation=Truncation(given["top_k"], given["top_p"], given["min_p"]),
        context_limit=given["context_limit"],
    )


def sample_in_batches(
    model: Model,
    prompts: Sequence[SystemPrompt],
    problems: Sequence[Problem],
    environment: Environment | Dialogue,
    batch_size: int,
    *,
    chat: ChatFormat,
    capacity: Capacity,
    **settings: Any,
) -> Iterator[Rollouts]:
    """Samples all prompts on all problems, at most `batch_size` problems at a time.

    Args:
      model, prompts, problems, environment, chat, capacity: as for `collect_rollouts`.
      batch_size: maximum problems per batch. It does not affect what is sampled.
      **settings: further arguments of `collect_rollouts`.

    Yields:
      Rollouts [M, b, N] with b nearly constant, since every size is compiled.
    """
    longest = longest_problem(model.tokenizer, problems, environment, chat.template_arguments)
    capacity = dataclasses.replace(capacity, longest_problem=longest)
    for chosen in np.array_split(np.arange(len(problems)), -(-len(problems) // batch_size)):
        part = [problems[i] for i in chosen]
        yield collect_rollouts(model, prompts, part, environment, chat=chat, capacity=capacity, **settings)


def append(path: Path, rollouts: Rollouts, model: str, prompts: Sequence[str], data: str) -> None:
    """Appends one JSON line per rollout to a file, with the names of model, prompt and data."""
    lines = []
    for record in records(rollouts):
        named = {**record, "model": model, "prompt": prompts[record["slot"]], "data": data}
        lines.append(json.dumps(plain(named, path.name), ensure_ascii=False))
    with durable.disk_full_explained(path), open(path, "a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def settings(request: Request) -> dict[str, Any]:
    """Returns the settings that affect the results besides model, prompt and data; None: from the model."""
    names = ("environment", "answer_format", "instruction", "options", "reward", "seed", "numerics")
    return {name: getattr(request, name) for name in names} | request.sampling


def tell(text: str) -> None:
    """Prints progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def _footnote(request: Request) -> str:
    sampling = request.sampling
    cut = "".join(
        f"{name.replace('_', '-')}: {sampling[name]:g}, "
        for name, all_tokens in (("top_k", 0), ("top_p", 1), ("min_p", 0))
        if sampling[name] != all_tokens
    )
    return (
        f"Samples per problem: {sampling['group_size']}, temperature: {sampling['temperature']:g}, {cut}"
        f"max. new tokens: {sampling['max_new_tokens']}. In brackets: 95% intervals over problems."
    )
