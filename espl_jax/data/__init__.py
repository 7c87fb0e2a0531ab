"""Problem sets: where they come from, how they are split, in which order they are drawn."""

from __future__ import annotations

from collections.abc import Mapping

from espl_jax.data.arithmetic import addition
from espl_jax.data.jsonl import read_jsonl
from espl_jax.data.problems import ProblemSet


def load(
    spec: str, split: str = "train", seed: int = 0, fields: Mapping[str, str] | None = None
) -> ProblemSet:
    """Loads a problem set.

    Args:
      spec: the path of a `.jsonl` file, or a generated set such as `addition:digits=2,count=200` (options
        `digits`, `count`, and `split` and `seed` where they should differ from the arguments).
      split: which part of a generated set: `train`, `validation` or `test`. Files are taken whole.
      seed: draws the problems of a generated set.
      fields: field names of a file, as for `read_jsonl`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a spec of another form, or data that cannot be used.
    """
    if spec.startswith("addition:"):
        options = {"split": split, "seed": seed, **_options(spec)}
        return addition(**options)
    if spec.endswith(".jsonl"):
        return read_jsonl(spec, fields)
    raise ValueError(
        f"data={spec!r} is not known; give the path of a .jsonl file, or addition:digits=2,count=200"
    )


def _options(spec: str) -> dict[str, int | str]:
    kinds = {"digits": int, "count": int, "seed": int, "split": str}
    options: dict[str, int | str] = {}
    for option in spec.partition(":")[2].split(","):
        name, _, value = option.strip().partition("=")
        try:
            options[name] = kinds[name](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"data={spec!r}: the option {option!r} is not understood; "
                f"options: {', '.join(kinds)}, each as name=value, numbers whole"
            ) from None
    if missing := {"digits", "count"} - set(options):
        raise ValueError(f"data={spec!r}: {' and '.join(sorted(missing))} missing; write name=value")
    return options
