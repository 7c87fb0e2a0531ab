"""Reads and writes rotary position embeddings (RoPE) in the formats of older and newer `config.json`."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from espl_jax.models.config import Rope
from espl_jax.models.rope import yarn_attention_factor


class Fields(Protocol):
    """Fields of a file: `get` returns None for a missing one, `[]` raises an error with its name."""

    def get(self, name: str, /) -> Any: ...

    def __getitem__(self, name: str, /) -> Any: ...


def read_ropes(c: Fields, gemma: bool) -> tuple[Rope, Rope | None]:
    """Returns the RoPE of the model and, for Gemma 3, of its layers with a window. Reads three formats:
    `rope_parameters` (by layer type for Gemma), or `rope_theta` with or without `rope_scaling`."""
    positions = c["max_position_embeddings"]
    given, scaling = c.get("rope_parameters") or {}, c.get("rope_scaling") or {}
    for name, value in (("rope_parameters", given), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{name}={value!r}: must be a JSON object; use config.json of the original model"
            )
    # The place in older files; transformers reads it too.
    beside = (
        {}
        if c.get("partial_rotary_factor") is None
        else {"partial_rotary_factor": c["partial_rotary_factor"]}
    )
    if not gemma:
        rope = {"rope_theta": c.get("rope_theta") or 10_000.0, **beside, **scaling, **given}
        if c.get("original_max_position_embeddings") and _kind(rope) in ("llama3", "yarn"):
            rope["original_max_position_embeddings"] = c["original_max_position_embeddings"]
        return _rope(rope, positions), None
    _warn_unknown("rope_parameters", given.keys() - {"full_attention", "sliding_attention", "truncate"})
    full = {
        "rope_theta": c.get("rope_theta") or 1e6,
        **beside,
        **scaling,
        **(given.get("full_attention") or {}),
    }
    if _kind(full) == "yarn":
        # transformers reads this field next to the layer types, not inside them.
        full["truncate"] = given.get("truncate", True)
    local = {
        "rope_theta": c.get("rope_local_base_freq") or 10_000.0,
        **beside,
        **(given.get("sliding_attention") or {}),
    }
    return _rope(full, positions), _rope(local, positions)


_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""Supported kinds of RoPE -> required parameters."""

_ROPE_ALSO = {
    "llama3": ("original_max_position_embeddings",),
    "yarn": (
        *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
"""Kind of RoPE -> optional parameters."""


def _kind(p: Mapping[str, Any]) -> str:
    return p.get("rope_type") or p.get("type") or "default"


def _rope(p: dict[str, Any], max_positions: int) -> Rope:
    kind = _kind(p)
    if kind not in _ROPE_NEEDS:
        raise ValueError(f"rope_type={kind!r} is not supported; supported: {', '.join(_ROPE_NEEDS)}")
    if (share := p.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"partial_rotary_factor={share!r} is not supported; only 1.0 is")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    _warn_unknown(
        f"rope_parameters of rope_type={kind!r}",
        p.keys() - {*known, *_ROPE_NEEDS[kind], *_ROPE_ALSO.get(kind, ())},
    )

    def number(name: str) -> float:
        value = p.get(name)
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(
                f"rope_parameters.{name}={value!r}: rope_type={kind!r} needs a number above 0; use "
                "config.json of the original model"
            )
        return float(value)

    fields: dict[str, Any] = {"theta": number("rope_theta")}
    if kind == "default":
        return Rope(**fields)
    fields["scaling"] = kind
    if kind in ("llama3", "yarn"):
        p.setdefault("original_max_position_embeddings", max_positions)
        fields["original_positions"] = int(number("original_max_position_embeddings"))
    if kind == "yarn" and "factor" in p and p["factor"] is None:  # as DeepSeek has it
        p["factor"] = max_positions / fields["original_positions"]
    fields["factor"] = number("factor")
    if kind == "llama3":
        fields |= {name: number(name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        fields |= {name: number(name) for name in ("beta_fast", "beta_slow") if p.get(name)}
        given = p.get("attention_factor") is not None
        fields["attention_factor"] = number("attention_factor") if given else _yarn_attention(p)
        fields["truncate"] = p.get("truncate", True)
    return Rope(**fields)


def _warn_unknown(where: str, keys: Collection[str]) -> None:
    """Warns about unknown keys, which transformers ignores too."""
    if keys:
        warnings.warn(
            f"config.json: {where} has unknown keys {sorted(keys)}, which are ignored", stacklevel=2
        )


def _yarn_attention(p: Mapping[str, Any]) -> float:
    """Returns the default attention factor of YaRN."""
    if p.get("mscale") and p.get("mscale_all_dim"):
        weights = p["mscale"], p["mscale_all_dim"]
        return yarn_attention_factor(p["factor"], weights[0]) / yarn_attention_factor(p["factor"], weights[1])
    return yarn_attention_factor(p["factor"])


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """Returns `rope_parameters`, from which `read_ropes` reads the same RoPE."""
    parameters: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default"}
    if rope.scaling == "none":
        return parameters
    parameters |= {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_positions
    if rope.scaling == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        names = ("beta_fast", "beta_slow", "truncate", "attention_factor")
        parameters |= {name: getattr(rope, name) for name in names}
    return parameters
