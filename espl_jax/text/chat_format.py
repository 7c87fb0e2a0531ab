"""How conversations become text, and how replies are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How conversations become text, and how replies are read.

    Attributes:
      template_arguments: arguments of the chat template, such as `enable_thinking`.
      show_thinking: whether grader and reflector see thinking blocks.
      tool_format: how the model calls tools, one of `text.tool_calls.FORMATS`, or `auto` for what its chat
        template shows.
      stop_strings: texts that end a turn, beside the stop tokens.
    """

    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    show_thinking: bool = False
    tool_format: str = "auto"
    stop_strings: tuple[str, ...] = ()
