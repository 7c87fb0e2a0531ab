"""Problem sets: where they come from, how they are split, in which order they are drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from espl_jax.data.arithmetic import addition
from espl_jax.data.hub import read_hub
from espl_jax.data.jsonl import read_jsonl
from espl_jax.data.problems import ProblemSet, choose, join
from espl_jax.data.records import CANDIDATES
from espl_jax.data.specs import Source, parse
from espl_jax.data.tables import read_parquet
from espl_jax.types import Passage


def load(
    spec: str, split: str = "train", seed: int = 0, fields: Mapping[str, str] | None = None
) -> ProblemSet:
    """Loads a problem set.

    Files are taken whole, and of a data set of the hub the split that the spec names, `train` by default.
    Of both, `shuffle=SEED` shuffles the problems, then `skip=N` leaves out the first of them, then `count=N`
    takes so many. `text=`, `answer=` and `id=` name fields, `repeats=` is that of `read_problems`; `config=`
    and `revision=` choose of the hub, see `read_hub`. The options of generated sets are the parameters of
    `addition` and `encyclopedia.questions`.

    Args:
      spec: where the problems come from, see `specs`.
      split: which part of a generated set, unless its options say: `train`, `validation` or `test`.
      seed: draws the problems of a generated set, unless its options say.
      fields: names of fields, as for `read_problems`; options of a source go before them.

    Raises:
      OSError: if a file or a data set is not there, or cannot be reached; see `read_hub`.
      ValueError: for a spec of another form, data that cannot be used, or sources that share a problem.
    """
    return join([(source.name, _load(source, split, seed, fields)) for source in parse(spec)])


def passages(spec: str, seed: int = 0) -> tuple[Passage, ...]:
    """The passages that hold what the questions of a generated set ask for.

    Args:
      spec: as for `load`; one of its sources is an encyclopedia.
      seed: draws it, unless its options say.

    Raises:
      ValueError: if there is none.
    """
    from espl_jax.data.encyclopedia import problems

    for source in parse(spec):
        if source.kind == "encyclopedia":
            given = _arguments(problems.questions, source, {"seed": seed})
            taken = inspect.signature(problems.passages).parameters
            return problems.passages(**{name: given[name] for name in taken if name in given})
    raise ValueError(f"data={spec!r} has no passages to search in; give a retriever, or data=encyclopedia")


def _load(source: Source, split: str, seed: int, fields: Mapping[str, str] | None) -> ProblemSet:
    if source.kind == "addition":
        return _generate(addition, source, split, seed)
    if source.kind == "encyclopedia":
        from espl_jax.data.encyclopedia.problems import questions

        return _generate(questions, source, split, seed)
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
    """The options of a source, of the types that the parameters of a generator are annotated with."""
    parameters = inspect.signature(generator).parameters
    options: dict[str, Any] = dict(defaults)
    for name, value in source.options.items():
        try:
            whole = parameters[name].annotation in (int, "int", "int | None")
            options[name] = int(value) if whole else value
        except (KeyError, ValueError):
            raise ValueError(
                f"data={source.spec!r}: the option {f'{name}={value}'!r} is not understood; "
                f"options: {', '.join(parameters)}, each as name=value, numbers whole"
            ) from None
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    if lacking := needed - set(options):
        raise ValueError(f"data={source.spec!r}: {' and '.join(sorted(lacking))} missing; write name=value")
    return options
