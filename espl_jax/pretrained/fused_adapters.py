"""Adapters of gpt-oss' experts in the format of PEFT, as one adapter per expert and back.

All experts of a layer are in one parameter (`fused_experts`), and PEFT adapts parameters by their names
(`target_parameters`). Its tensors for `gate_up_proj` and `down_proj`, of rank R each:

| tensor | shape | order |
| --- | --- | --- |
| `lora_A` | [E * R, inputs] | by expert, then by rank |
| `lora_B` | [outputs, R * E] | columns by rank, then by expert |

If both are adapted, those of `gate_up_proj` are named `experts.base_layer.lora_A`, else `experts.lora_A`.

Ours are separate for `gate` and `up`: together they are an adapter of `gate_up_proj` with R = 2r, in which
each half of the rank has the outputs of one of the two. An adapter that PEFT trained has R = r, and both
share A.

Shape letters: E experts, r rank.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from espl_jax.pretrained.safetensors_files import PartOf, Stored, StoredTensor
from espl_jax.pretrained.shards import Tensor

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parameter -> parts of an expert, whose outputs alternate."""

PARAMETERS = {part: f"mlp.experts.{name}" for name, parts in _PARTS.items() for part in parts}
"""Part of an expert -> its name in `target_parameters`."""

_PART = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>\w+_proj)\.lora_(?P<factor>[AB])\.weight"
)
_FUSED = re.compile(r"(?P<experts>.*\.experts)\.(?P<inner>base_layer\.)?lora_(?P<factor>[AB])\.weight")


def patterns(rank: int, alpha: float) -> dict[str, dict[str, float]]:
    """Returns the settings of PEFT for `gate_up_proj`, whose rank is that of `gate` and `up` together."""
    return {"rank_pattern": {"gate_up_proj": 2 * rank}, "alpha_pattern": {"gate_up_proj": 2 * alpha}}


def fits(settings: Mapping[str, Any], scale: Callable[[float, float], float]) -> bool:
    """Returns whether all adapters of a folder have one scale, and ranks as above.

    Args:
      settings: of adapter_config.json.
      scale: the scale of an adapter, from its alpha and rank.
    """
    rank, alpha = settings["r"], settings["lora_alpha"]
    ranks, alphas = (settings.get(f"{name}_pattern") or {} for name in ("rank", "alpha"))
    if any(not name.endswith("gate_up_proj") for name in {*ranks, *alphas}):
        return False
    ours, others = next(iter(ranks.values()), rank), next(iter(alphas.values()), alpha)
    return len(ranks) < 2 and len(alphas) < 2 and math.isclose(scale(others, ours), scale(alpha, rank))


def join(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Joins the adapters of all experts of a layer, to write them; other tensors stay as they are."""
    groups: dict[tuple[str, str, str], list[tuple[int, int, Tensor]]] = {}
    joined = []
    for tensor in tensors:
        if (found := _PART.fullmatch(tensor.name)) is None:
            joined.append(tensor)
            continue
        name, parts = next(each for each in _PARTS.items() if found["part"] in each[1])
        place = int(found["number"]), parts.index(found["part"]), tensor
        groups.setdefault((found["experts"], name, found["factor"]), []).append(place)
    for (experts, name, factor), places in groups.items():
        inner = name == "gate_up_proj" and (experts, "down_proj", factor) in groups
        wrapped = f"{experts}.{'base_layer.' if inner else ''}lora_{factor}.weight"
        joined.append(_joined(wrapped, factor, len(_PARTS[name]), places))
    return joined


def _joined(name: str, factor: str, kinds: int, places: Sequence[tuple[int, int, Tensor]]) -> Tensor:
    """Returns the tensor of `kinds` parts by turns, from (expert, part, its own factor)."""
    first = places[0][2].shape
    count = 1 + max(number for number, _, _ in places)
    if factor == "A":
        rank, inputs = first
        shape = (count * kinds * rank, inputs)
    else:
        outputs, rank = first
        shape = (outputs * kinds, kinds * rank * count)

    def read() -> np.ndarray:
        out = np.zeros(shape, np.float32)
        for number, kind, tensor in places:
            if factor == "A":
                out.reshape(count, kinds, rank, inputs)[number, kind] = tensor.read()
            else:
                out.reshape(outputs, kinds, kinds, rank, count)[:, kind, kind, :, number] = tensor.read()
        return out

    return Tensor(name, shape, read)


@dataclasses.dataclass(frozen=True)
class FactorOfExpert(PartOf):
    """A factor of the adapter of a part of an expert; a `Stored`.

    Attributes:
      whole: the tensor of all experts.
      factor: `A` or `B`.
      number: number of the expert.
      kind: which part of the parameter, of how many `kinds`.
      rank: r.
      count: E.
    """

    factor: str
    number: int
    kind: int
    kinds: int
    rank: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        if self.factor == "A":
            return self.rank, self.whole.shape[1]
        return self.whole.shape[0] // self.kinds, self.rank

    def view(self) -> np.ndarray:
        """Returns the factor as a view of the memory-mapped tensor."""
        # With R = r, the axis of halves has one entry, which all parts share.
        if self.factor == "A":
            halves = self.whole.view().reshape(self.count, -1, *self.shape)
            return halves[self.number, self.kind % halves.shape[1]]
        outputs, rank = self.shape
        halves = self.whole.view().reshape(outputs, self.kinds, -1, rank, self.count)
        return halves[:, self.kind, self.kind % halves.shape[2], :, self.number]


def split(
    tensors: Mapping[str, StoredTensor], parameters: Collection[str], count: int, rank: int
) -> dict[str, Stored]:
    """Inverts `join`: replaces the adapters of all experts by one for each part of an expert.

    Args:
      tensors: of a file.
      parameters: `target_parameters` of its settings.
      count: E.
      rank: r.

    Raises:
      ValueError: if an adapter of `gate_up_proj` has another rank than r, or 2r but not in the form above.
    """
    adapted = [name for name in _PARTS if any(each.endswith(name) for each in parameters)]
    parts: dict[str, Stored] = {}
    for name, whole in tensors.items():
        found = _FUSED.fullmatch(name)
        if found is None or not adapted:
            parts[name] = whole
            continue
        fused = adapted[0] if found["inner"] else adapted[-1]
        kinds = _PARTS[fused]
        ranks, rest = divmod(whole.shape[0 if found["factor"] == "A" else -1], count)
        shared = ranks == rank
        if rest or not (shared or ranks == len(kinds) * rank):
            raise ValueError(
                f"{whole.path}: {name} is {list(whole.shape)}, but r={rank} and {count} experts require "
                f"{rank * count} or, for gate_up_proj, {2 * rank * count}; merge the adapter into its base"
            )
        if found["factor"] == "B" and not shared:
            _check_halves(name, whole, rank, count)
        for kind, part in enumerate(kinds):
            for number in range(count):
                place = f"{found['experts']}.{number}.{part}.lora_{found['factor']}.weight"
                parts[place] = FactorOfExpert(whole, found["factor"], number, kind, len(kinds), rank, count)
    return parts


def _check_halves(name: str, whole: StoredTensor, rank: int, count: int) -> None:
    """Raises if `gate` has outputs in the half of `up`, or the reverse."""
    halves = whole.view().reshape(-1, 2, 2, rank, count)
    if halves[:, 0, 1].any() or halves[:, 1, 0].any():
        raise ValueError(
            f"{whole.path}: {name} has rank {2 * rank}, and gate and up share it, so each would need an "
            f"adapter of this rank, but r={rank}; merge the adapter into its base with PEFT "
            "(merge_and_unload), save the model and load its folder"
        )
