"""Samples and grades what a command line asks for."""

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
from espl_jax.pretrained import hf_folder, peft, smollm2
from espl_jax.pretrained.load import find_folder, load_pretrained
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
from espl_jax.types import Problem, Rollouts, SystemPrompt


def compare(request: Request) -> list[Cell]:
    """Evaluates every model under every prompt on every problem set, shows the results and writes the files.

    A model is loaded once; its prompts are sampled side by side, so that what they share is run once. Where
    something fails on the way, the cells that were done by then are shown and written all the same.

    Returns:
      The cells, prompts within problem sets within models.

    Raises:
      ValueError: for problems that the environment cannot grade, and models that are not there; both before
        anything is sampled. Else as loading and sampling do.
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
                cells.append(cell)  # one by one, so that an error leaves those before it
    finally:
        if cells:
            report(cells, request)
    return cells


def report(cells: Sequence[Cell], request: Request) -> None:
    """Shows the cells, at least one, and writes the `.json` files."""
    print(show(cells))
    print(f"\n{_footnote(request)}", flush=True)
    for path in request.out:
        if path.suffix == ".json":
            results = [dataclasses.asdict(cell) for cell in cells]
            saved = plain({"settings": settings(request), "results": results}, path.name)
            durable.replace(path, f"{json.dumps(saved, indent=2, ensure_ascii=False)}\n".encode())
        tell(f"written: {path}")


def find_model(source: str) -> None:
    """Makes sure that a model can be loaded as far as its small files say; one of the hub is downloaded.

    Args:
      source: as for `load_model`.

    Raises:
      As `load_model`.
    """
    if is_run(source):
        find_model(check_run(source).model.source)
    elif source == "smollm2":
        smollm2.find_gguf()
    elif source.endswith(".gguf"):
        if not Path(source).expanduser().is_file():
            raise FileNotFoundError(f"there is no file {source}; correct the path")
    else:
        folder = find_folder(source)
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            find_model(peft.base_of(folder))
        else:
            hf_folder.read_config(folder)


def check_gradable(environment: Environment | Dialogue, problem_set: ProblemSet) -> None:
    """Raises ValueError unless every problem's own answer, put into a box, is graded as a success."""
    problems = problem_set.problems
    grades = checked_grades(environment, problems, [rf"\boxed{{{problem.answer}}}" for problem in problems])
    wrong = [problem for problem, grade in zip(problems, grades, strict=True) if not grade.success]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(problems)} problems would be graded wrong when given their own answer, "
            f"the first one {wrong[0].id} with answer {wrong[0].answer!r}; correct the data, or choose "
            "another --environment or --answer_format"
        )


def evaluate_model(
    source: str, request: Request, environment: Environment | Dialogue, mesh: jax.sharding.Mesh | None
) -> Iterator[Cell]:
    """The cells of one model, which is loaded here and given up at the end."""
    tell(f"{source}: loading")
    model = load_model(source, mesh, request.numerics)
    chat = chat_format(source, request.sampling)
    for name, problem_set in request.problem_sets.items():
        with naming("data", name):
            check_room(request, source, model, problem_set, environment, chat)
    for name, problem_set in request.problem_sets.items():
        tell(
            f"{source}, {name}: problems {len(problem_set)}, prompts {len(request.prompts)}, samples of each "
            f"{request.sampling['group_size']}; the first batch takes longer, since it compiles"
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
                f"{source}, {name}: {done} of {len(problem_set)} problems, mean reward of these "
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
    """Raises ValueError, naming problems, unless all prompts and problems leave room for an answer.

    Args:
      request: its prompts and its context limit are looked at.
      source: of the model, for messages.
      model, environment, chat: as for `collect_rollouts`.
      problem_set: all its problems are looked at.
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
                f"longest makes {max(long.values())} tokens, which leaves no room in a context of {context}; "
                f"raise --context_limit ({source} takes {most}), shorten the prompt, or leave them out"
            )


def load_model(source: str, mesh: jax.sharding.Mesh | None, numerics: Mapping[str, str]) -> Model:
    """Loads a model.

    Args:
      source: the work directory of a run, for its trained weights, or as for `load_pretrained`.
      mesh: devices that share the params.
      numerics: DecoderConfig fields; what is left out is as in the run, or what suits the devices.

    Raises:
      As `read_run` and `load_pretrained`.
    """
    if is_run(source):
        return read_run(source, mesh, **numerics).model
    return load_pretrained(source, mesh=mesh, **dict.fromkeys(CHOSEN, AUTO) | dict(numerics))


def chat_format(source: str, given: Mapping[str, Any]) -> ChatFormat:
    """How conversations become text: as in the run that the model comes from, unless it is given.

    Args:
      source: as for `load_model`.
      given: as `Request.sampling`; each of `chat_template_kwargs` goes before the run's.
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
    """How rollouts are drawn: the same for all models that are compared."""
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
    """All prompts on all problems, side by side, at most `batch_size` problems at a time.

    Args:
      model, prompts, problems, environment, chat, capacity: as for `collect_rollouts`.
      batch_size: problems whose rollouts are held at once. What is drawn does not depend on it.
      **settings: further arguments of `collect_rollouts`.

    Yields:
      Rollouts [M, b, N], b being nearly the same in all, since every size is compiled.
    """
    longest = longest_problem(model.tokenizer, problems, environment, chat.template_arguments)
    capacity = dataclasses.replace(capacity, longest_problem=longest)
    for chosen in np.array_split(np.arange(len(problems)), -(-len(problems) // batch_size)):
        part = [problems[i] for i in chosen]
        yield collect_rollouts(model, prompts, part, environment, chat=chat, capacity=capacity, **settings)


def append(path: Path, rollouts: Rollouts, model: str, prompts: Sequence[str], data: str) -> None:
    """Adds one JSON line for each rollout to a file, with what model, prompt and data are called."""
    lines = []
    for record in records(rollouts):
        named = {**record, "model": model, "prompt": prompts[record["slot"]], "data": data}
        lines.append(json.dumps(plain(named, path.name), ensure_ascii=False))
    with durable.disk_full_explained(path), open(path, "a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def settings(request: Request) -> dict[str, Any]:
    """What decides the results beside model, prompt and data; what is None is the model's own."""
    names = ("environment", "answer_format", "instruction", "options", "reward", "seed", "numerics")
    return {name: getattr(request, name) for name in names} | request.sampling


def tell(text: str) -> None:
    """Shows progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def _footnote(request: Request) -> str:
    sampling = request.sampling
    cut = "".join(
        f"{name.replace('_', '-')}: {sampling[name]:g}, "
        for name, all_tokens in (("top_k", 0), ("top_p", 1), ("min_p", 0))
        if sampling[name] != all_tokens
    )
    return (
        f"Samples a problem: {sampling['group_size']}, temperature: {sampling['temperature']:g}, {cut}"
        f"new tokens: {sampling['max_new_tokens']} at most. In brackets: 95% intervals over problems."
    )
