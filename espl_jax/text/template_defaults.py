"""Adds a default system prompt and default arguments to a chat template; clients need not send them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NAMED = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}

_CONDITION = 'messages | selectattr("role", "in", ["system", "developer"]) | list | length == 0'

# Every line is a statement, whose newline transformers and compatible servers drop (`trim_blocks`), so
# nothing is written before the template itself. A `-%}` would also strip its leading whitespace.
_AS_MESSAGE = """\
{% if CONDITION %}
{% set messages = [{"role": "system", "content": SYSTEM}] + messages | list %}
{% endif %}
"""

# Content parts are indexed, not looped over: from such a loop vLLM would conclude that the template expects
# lists.
_IN_USER_TURN = """\
{% if CONDITION %}
{% set evolved = namespace(turns=[], text=SYSTEM ~ "\\n\\n") %}
{% for turn in messages %}
{% if evolved.text and turn.role == "user" %}
{% set content = turn.content %}
{% if content is string or not content %}
{% set content = evolved.text ~ (content or "") %}
{% elif content[0].type == "text" %}
{% set content = [dict(content[0], text=evolved.text ~ content[0].text)] + content[1:] %}
{% else %}
{% set content = [dict(type="text", text=evolved.text)] + content %}
{% endif %}
{% set evolved.turns = evolved.turns + [dict(turn, content=content)] %}
{% set evolved.text = "" %}
{% else %}
{% set evolved.turns = evolved.turns + [turn] %}
{% endif %}
{% endfor %}
{% set messages = evolved.turns %}
{% endif %}
"""


def with_default_system(template: str, system: str, has_system_role: bool) -> str:
    """Returns a chat template that adds `system` to conversations without a system message.

    Its output is that of `render` for the same conversation with `system` in front: a system message, which
    replaces a default of the template, or, if the template has no system role, the text and a blank line at
    the beginning of the first user turn. Conversations with a system or developer message, and all other
    behavior of the template, are unchanged.

    Args:
      template: Jinja source, as in transformers.
      system: the text, with any characters; a blank text leaves the template unchanged.
      has_system_role: whether the template writes system messages (`text.chat.has_system_role`).
    """
    if not system.strip():
        return template
    prefix = _AS_MESSAGE if has_system_role else _IN_USER_TURN
    # The system text is inserted last, since it may contain anything.
    return prefix.replace("CONDITION", _CONDITION).replace("SYSTEM", _literal(system)) + template


def with_default_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """Returns a chat template with defaults for arguments (`enable_thinking`, ...).

    Args:
      template: Jinja source, as in transformers.
      arguments: name -> JSON value.
    """
    lines = [
        f"{{% if {name} is not defined %}}\n{{% set {name} = {_value(value)} %}}\n{{% endif %}}\n"
        for name, value in arguments.items()
    ]
    return "".join(lines) + template


def _value(value: Any) -> str:
    """Returns a JSON value as a Jinja literal."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _literal(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(name)}: {_value(item)}' for name, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)


def _literal(text: str) -> str:
    """Returns a text as a Jinja string literal; only unprintable characters are escaped."""

    def escape(match: re.Match[str]) -> str:
        return _NAMED.get(match[0], f"\\x{ord(match[0]):02x}")

    return '"' + re.sub(r'[\\"\x00-\x1f\x7f-\x9f]', escape, text) + '"'
