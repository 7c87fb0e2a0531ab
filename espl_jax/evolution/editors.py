"""The editors of prompts, by the form of what they edit."""

from __future__ import annotations

from espl_jax.evolution.principle_editor import PrincipleEditor
from espl_jax.evolution.prose_editor import ProseEditor

EDITORS: dict[str, type[PrincipleEditor] | type[ProseEditor]] = {
    "principles": PrincipleEditor,
    "prose": ProseEditor,
}
