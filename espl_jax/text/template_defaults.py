"""System prompt and arguments as defaults of a chat template: who serves the model need not send them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NAMED = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}

_CONDITION = 'messages | selectattr("role", "in", ["system", "developer"]) | list | length == 0'

# Every line is a statement: transformers and the servers that read its templates drop the newline after one
# (`trim_blocks`), so that nothing is written before the template's own first character. A `-%}` instead would
# eat white space that the template begins with.
_AS_MESSAGE = """\
{% if CONDITION %}
{% set messages = [{"role": "system", "content": SYSTEM}] + messages | list %}
{% endif %}
"""

# Parts of a content are indexed and not looped over: vLLM takes such a loop for a sign that the template
# wants contents as lists.
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
    """A chat template that speaks under `system` where a conversation brings no system message of its own.

    What it writes is then what `render` writes of the same conversation begun by `system`: a system message
    in front, in the place of a default that the template itself may have, or, where the template has no
    system role, the text and a blank line at the head of the first user turn. Conversations with a message of
    role system or developer, and everything else that the template does, stay as they are.

    Args:
      template: in Jinja, as transformers reads it.
      system: the text, any characters; a blank one leaves the template alone.
      has_system_role: whether the template writes system messages (`text.chat.has_system_role`).
    """
    if not system.strip():
        return template
    prefix = _AS_MESSAGE if has_system_role else _IN_USER_TURN
    # The system text last: it may contain anything.
    return prefix.replace("CONDITION", _CONDITION).replace("SYSTEM", _literal(system)) + template


def with_default_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """A chat template for which these arguments (`enable_thinking`, ...) have these values unless given.

    Args:
      template: in Jinja, as transformers reads it.
      arguments: name -> JSON value.
    """
    lines = [
        f"{{% if {name} is not defined %}}\n{{% set {name} = {_value(value)} %}}\n{{% endif %}}\n"
        for name, value in arguments.items()
    ]
    return "".join(lines) + template


def _value(value: Any) -> str:
    """A Jinja literal of a JSON value."""
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
    """A Jinja string literal. Characters that are not for reading are escaped, the others stay readable."""

    def escape(match: re.Match[str]) -> str:
        return _NAMED.get(match[0], f"\\x{ord(match[0]):02x}")

    return '"' + re.sub(r'[\\"\x00-\x1f\x7f-\x9f]', escape, text) + '"'
