"""The chat format: how conversations are rendered and replies parsed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How conversations are rendered and replies parsed.

    Attributes:
      template_arguments: arguments of the chat template, such as `enable_thinking`.
      show_thinking: whether grader and reflector see thinking blocks.
      tool_format: syntax of tool calls, one of `text.tool_calls.FORMATS`, or `auto` to derive it from the
        chat template.
      stop_strings: strings that end a turn, in addition to the stop tokens.
    """

    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    show_thinking: bool = False
    tool_format: str = "auto"
    stop_strings: tuple[str, ...] = ()
