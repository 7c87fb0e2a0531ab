"""What an edited prompt is, and what an editor of prompts can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from espl_jax.evolution.edits import (
    Edit,
)
from espl_jax.types import SystemPrompt


@dataclasses.dataclass(frozen=True)
class Draft:
    """An edited prompt.

    Attributes:
      prompt: the parent with its new text or principles.
      edits: what made it, for `replay_edits`.
      evidence: what the operator went by.
    """

    prompt: SystemPrompt
    edits: tuple[dict[str, Any], ...]
    evidence: dict[str, Any]


class Editor(Protocol):
    """Edits one parent with the help of a reflector, through `Record`, which asks and counts."""

    def criticize(self, values: Sequence[Mapping[str, Any]]) -> tuple[Edit, ...]:
        """Edits that critiques propose, one critique for each set of values (a problem, its attempts)."""
        ...

    def revise(self, proposed: Sequence[Edit]) -> Draft:
        """What one revision of all that was proposed makes of the parent."""
        ...

    def reflect(self, problems: str) -> tuple[Draft, bool]:
        """What one call for all problems makes of the parent, and whether it proposed a usable edit."""
        ...

    def rewrite(self, problems: str) -> tuple[Draft, bool]:
        """What a rewrite of the whole prompt makes of the parent, and whether there was a usable one."""
        ...

    def cross(self, values: Mapping[str, Any]) -> tuple[Draft, bool]:
        """What a crossover makes of the parent, and whether it proposed a usable edit."""
        ...
