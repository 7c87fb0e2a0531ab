"""The editors of prompts, by the form of what they edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from espl_jax.evolution.drafts import Editor
from espl_jax.evolution.principle_editor import PrincipleEditor
from espl_jax.evolution.prose_editor import ProseEditor
from espl_jax.evolution.reflection import Record
from espl_jax.types import Problem, SystemPrompt

EDITORS: Mapping[str, Callable[[SystemPrompt, Record, Sequence[Problem]], Editor]] = {
    "principles": PrincipleEditor,
    "prose": ProseEditor,
}
