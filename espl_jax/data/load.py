"""Loads problem sets from data specs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from espl_jax.data.arithmetic import addition
from espl_jax.data.gym import questions as gym_questions
from espl_jax.data.hub import read_hub
from espl_jax.data.jsonl import read_jsonl
from espl_jax.data.problems import ProblemSet, choose, join
from espl_jax.data.records import CANDIDATES
from espl_jax.data.specs import Source, parse
from espl_jax.data.tables import read_parquet
from espl_jax.gym import PREFIX as GYM
from espl_jax.types import Passage


def load(
    spec: str, split: str = "train", seed: int = 0, fields: Mapping[str, str] | None = None
) -> ProblemSet:
    """Loads a problem set.

    A file is loaded in full. For a data set on the Hub, the option `split=` selects the split (default
    `train`), `config=` and `revision=` the version; see `read_hub`. For both, `shuffle=SEED` shuffles the
    problems, then `skip=N` drops the first N, then `count=N` keeps N. `text=`, `answer=` and `id=` name
    fields, and `repeats=` is as in `read_problems`. Generated sets take the parameters of `addition` and
    `encyclopedia.questions` as options, and tasks of reasoning-gym those of `gym.questions`.

    Args:
      spec: the data spec; see `specs`.
      split: split of a generated set, unless set by its options: `train`, `validation` or `test`.
      seed: seed of a generated set, unless set by its options.
      fields: names of fields, as for `read_problems`; options of a source override them.

    Raises:
      OSError: if a file or a data set does not exist or cannot be reached; see `read_hub`.
      ValueError: for an invalid spec, unusable data, or sources that share a problem.
    """
    return join([(source.name, _load(source, split, seed, fields)) for source in parse(spec)])


def passages(spec: str, seed: int = 0) -> tuple[Passage, ...]:
    """Returns the passages that answer the questions of a generated encyclopedia.

    Args:
      spec: as for `load`; one of its sources must be an encyclopedia.
      seed: seed of the encyclopedia, unless set by its options.

    Raises:
      ValueError: if no source is an encyclopedia.
    """
    from espl_jax.data.encyclopedia import problems

    for source in parse(spec):
        if source.kind == "encyclopedia":
            given = _arguments(problems.questions, source, {"seed": seed})
            taken = inspect.signature(problems.passages).parameters
            return problems.passages(**{name: given[name] for name in taken if name in given})
    raise ValueError(f"data={spec!r}: no passages to search; give a retriever, or data=encyclopedia")


def _load(source: Source, split: str, seed: int, fields: Mapping[str, str] | None) -> ProblemSet:
    if source.kind == "addition":
        return _generate(addition, source, split, seed)
    if source.kind == "encyclopedia":
        from espl_jax.data.encyclopedia.problems import questions

        return _generate(questions, source, split, seed)
    if source.kind == GYM:
        try:
            return gym_questions(source.place, source.options, split)
        except ValueError as error:
            raise ValueError(f"data={source.spec!r}: {error}") from error
    options = source.options
    fields = dict(fields or {}) | {name: options[name] for name in CANDIDATES if name in options}
    repeats = {"repeats": options["repeats"]} if "repeats" in options else {}
    if source.kind == "hub":
        version = {name: options[name] for name in ("split", "config", "revision") if name in options}
        whole = read_hub(source.place, **version, fields=fields, **repeats, prefix=source.name)
    else:
        read = {"jsonl": read_jsonl, "parquet": read_parquet}[source.kind]
        whole = read(source.place, fields, **repeats)
    return choose(whole, *(source.number(name) for name in ("shuffle", "skip", "count")))


def _generate(generator: Callable[..., ProblemSet], source: Source, split: str, seed: int) -> ProblemSet:
    return generator(**_arguments(generator, source, {"split": split, "seed": seed}))


def _arguments(generator: Callable[..., Any], source: Source, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a source, converted to the annotated types of the generator's parameters."""
    parameters = inspect.signature(generator).parameters
    options: dict[str, Any] = dict(defaults)
    for name, value in source.options.items():
        try:
            whole = parameters[name].annotation in (int, "int", "int | None")
            options[name] = int(value) if whole else value
        except (KeyError, ValueError):
            raise ValueError(
                f"data={source.spec!r}: invalid option {f'{name}={value}'!r}; "
                f"options are {', '.join(parameters)}, as name=value with integer numbers"
            ) from None
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    if lacking := needed - set(options):
        raise ValueError(
            f"data={source.spec!r}: missing option {' and '.join(sorted(lacking))}; write name=value"
        )
    return options
