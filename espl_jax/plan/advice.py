"""Suggests other settings for a run that does not fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from espl_jax.plan.chips import find_chip
from espl_jax.plan.costs import EVALUATED, GIB, least_memory, plan
from espl_jax.run.config import Config
from espl_jax.run.workloads import Lengths


def alternatives(config: Config, topology: str) -> Iterator[tuple[str, Any, str]]:
    """Yields (description, config, topology) of other settings to try, smallest changes first."""
    kind, _, shape = topology.partition(":")
    chip = find_chip(topology)
    devices = _count(shape)

    def changed(**fields: Any) -> Any:
        other = copy.deepcopy(config)
        with other.unlocked():
            other.update_from_flattened_dict({name.replace("__", "."): x for name, x in fields.items()})
        return other

    def said(fields: dict[str, Any]) -> str:
        return " ".join(f"--config.{name.replace('__', '.')}={x}" for name, x in fields.items())

    changes: list[dict[str, Any]] = [{"loss__microbatch_rows": 1}]
    changes += [{"model__remat": remat, "loss__microbatch_rows": 1} for remat in ("rounded", "offload")]
    for tensor in (2, 4, 8):
        if devices % tensor == 0 and tensor != config.mesh.tensor:
            mesh = {"mesh__data": 1, "mesh__fsdp": -1, "mesh__tensor": tensor}
            changes += [mesh, mesh | {"loss__microbatch_rows": 1}]
    if not config.lora.rank:
        changes.append({"optimizer__kind": "adafactor", "loss__microbatch_rows": 1})
    tried = [config.to_dict()]
    for fields in changes:
        other = changed(**fields)
        if other.to_dict() not in tried:
            tried.append(other.to_dict())
            yield said(fields), other, topology
    for larger in chip.slices:
        if _count(larger) > devices:
            yield f"--topology={kind}:{larger}", config, f"{kind}:{larger}"
            fields = {"mesh__data": 1, "mesh__fsdp": -1, "mesh__tensor": 8, "loss__microbatch_rows": 1}
            yield f"--topology={kind}:{larger} {said(fields)}", changed(**fields), f"{kind}:{larger}"
    if not config.lora.rank:
        yield "--config.lora.rank=32", changed(lora__rank=32), topology


def _count(shape: str) -> int:
    count = 1
    for size in shape.split("x"):
        count *= int(size)
    return count


def advice(
    config: Config, topology: str, lengths: Lengths, evaluated: int = EVALUATED, most: int = 3
) -> list[str]:
    """Returns the first settings that fit, found by compiling the largest programs with each."""
    found = []
    for words, other, where in alternatives(config, topology):
        if least_memory(other, where, lengths) > find_chip(where).memory:
            continue
        result = plan(other, where, lengths, every_bucket=False, evaluated=evaluated, say=lambda _: None)
        print(f"tried {words}: {'fits' if result.fits else 'does not fit'}", flush=True)
        if result.fits:
            found.append(f"{words}: {result.largest / GIB:.2f} GiB, at least {result.iteration:.0f} s")
        if len(found) == most:
            break
    return found
