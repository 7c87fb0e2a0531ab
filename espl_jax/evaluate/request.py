"""Reads and checks the flags of an evaluation, before jax is imported."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from espl_jax.choices import ENVIRONMENTS
from espl_jax.data import load
from espl_jax.data.problems import ProblemSet
from espl_jax.evaluate.prompts import label, read_prompt
from espl_jax.storage import json_values
from espl_jax.types import SystemPrompt


@dataclasses.dataclass(frozen=True)
class Request:
    """An evaluation of every model under every prompt on every problem set.

    Attributes:
      models: sources of the models.
      prompts: display name -> prompt.
      problem_sets: display name -> problems.
      numerics: DecoderConfig fields given on the command line.
      mesh: devices by axis.
      environment, answer_format, instruction, options, reward: as for `tasks.make_environment`.
      sampling: sampling settings of all models: arguments of `collect_rollouts`, with `top_k`, `top_p` and
        `min_p` in place of `truncation`; `show_thinking` is None to use the setting of the model's run.
      seed: seed of the random keys.
      batch_size: problems per batch.
      out: files to write.
    """

    models: tuple[str, ...]
    prompts: dict[str, SystemPrompt]
    problem_sets: dict[str, ProblemSet]
    numerics: dict[str, str]
    mesh: dict[str, int]
    environment: str
    answer_format: str
    instruction: str | None
    options: dict[str, Any]
    reward: str
    sampling: dict[str, Any]
    seed: int
    batch_size: int
    out: tuple[Path, ...]


def read_request(f: Any) -> Request:
    """Loads everything that the flags name, except the models.

    Args:
      f: the flag values of `__main__`.

    Raises:
      ValueError: with the flag, its value and the fix.
    """
    for flag, example in (("model", "smollm2"), ("data", "addition:digits=2,count=100")):
        if not getattr(f, flag):
            raise ValueError(f"--{flag} is missing; give at least one, e.g. --{flag}={example}")
    if f.environment not in ENVIRONMENTS and ":" not in f.environment:
        raise ValueError(
            f"--environment={f.environment}: choose one of {', '.join(ENVIRONMENTS)}, or give module:name"
        )
    formats = ENVIRONMENTS.get(f.environment, ())
    if formats and f.answer_format not in formats:
        raise ValueError(
            f"--answer_format={f.answer_format}: not supported by --environment={f.environment}; choose one "
            f"of {', '.join(formats)}"
        )
    if f.temperature == 0 and f.samples > 1:
        raise ValueError(
            f"--samples={f.samples}: greedy samples are identical; give --samples=1, or a --temperature "
            "above 0"
        )
    for flag, least in (("top_p", "above 0"), ("min_p", "at least 0")):
        value = getattr(f, flag)
        if not 0 <= value <= 1 or (flag == "top_p" and value == 0):
            raise ValueError(f"--{flag}={value:g}: must be {least} and at most 1")
    numerics = {name: getattr(f, name) for name in ("dtype", "param_dtype", "matmul_precision")}
    return Request(
        models=tuple(dict.fromkeys(f.model)),
        prompts=_prompts(f.prompt),
        problem_sets=_problem_sets(f.data, _fields(f.fields), f.limit),
        numerics={name: value for name, value in numerics.items() if value},
        mesh=_mesh(f.mesh),
        environment=f.environment,
        answer_format=f.answer_format,
        instruction=f.instruction,
        options=_json_object("options", f.options),
        reward=f.reward,
        sampling={
            "group_size": f.samples,
            "temperature": f.temperature,
            "top_k": f.top_k,
            "top_p": f.top_p,
            "min_p": f.min_p,
            "max_new_tokens": f.max_new_tokens,
            "stop_strings": tuple(f.stop_string),
            "context_limit": f.context_limit or None,
            "max_rows": f.max_rows or None,
            "chat_template_kwargs": _json_object("chat_template_kwargs", f.chat_template_kwargs),
            "show_thinking": f.show_thinking,
            "tool_format": f.tool_format,
        },
        seed=f.seed,
        batch_size=f.batch_size,
        out=_new_files(f.out),
    )


@contextlib.contextmanager
def naming(flag: str, value: str) -> Iterator[None]:
    """Prefixes the message of an error with the flag."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"--{flag}={value}: {error}") from error


def _prompts(given: Sequence[str]) -> dict[str, SystemPrompt]:
    prompts: dict[str, SystemPrompt] = {}
    for each in given:
        with naming("prompt", each):
            prompt, name = read_prompt(each), label(each)
            for other in prompts:
                if prompts[other].id == prompt.id:
                    raise ValueError(f"same text as {other}; remove one of them")
        # Different texts may have the same label.
        prompts[f"{name} ({prompt.id})" if name in prompts else name] = prompt
    return prompts


def _problem_sets(specs: Sequence[str], fields: dict[str, str], limit: int | None) -> dict[str, ProblemSet]:
    sets = {}
    for spec in specs:
        with naming("data", spec):
            whole = load.load(spec, "test", fields=fields)
        sets[spec] = dataclasses.replace(whole, problems=whole.problems[:limit])
    return sets


def _fields(given: Sequence[str]) -> dict[str, str]:
    return dict(_pair("fields", given, each, "text=task") for each in given)


def _mesh(given: Sequence[str]) -> dict[str, int]:
    pairs = [_pair("mesh", given, each, "data=1,fsdp=-1,tensor=2", r"-?\d+") for each in given]
    return {axis: int(size) for axis, size in pairs}


def _pair(flag: str, given: Sequence[str], pair: str, example: str, value: str = ".+") -> tuple[str, str]:
    match = re.fullmatch(rf"(\w+)=({value})", pair)
    if not match:
        raise ValueError(f"--{flag}={','.join(given)}: cannot parse {pair!r}; write it as in {example}")
    return match[1], match[2]


def _json_object(flag: str, given: str) -> dict[str, Any]:
    with naming(flag, given):
        value = json_values.parse(given)
        if not isinstance(value, dict):
            raise ValueError('not a JSON object; give one, e.g. {"enable_thinking": false}')
        return value


def _new_files(given: Sequence[str]) -> tuple[Path, ...]:
    for name in given:
        path = Path(name).expanduser()
        with naming("out", name):
            if path.suffix not in (".json", ".jsonl"):
                raise ValueError(
                    "unknown format; give a name that ends with .json (results) or .jsonl (rollouts)"
                )
            if path.exists():
                raise ValueError("the file exists; choose another name, or remove it")
            if not path.parent.is_dir():
                raise ValueError(f"the folder {path.parent} does not exist; create it, or choose another one")
    return tuple(Path(name).expanduser() for name in given)
