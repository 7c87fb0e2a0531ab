"""Chat templates of a tokenizer: selection among several, and a fixed date."""

from __future__ import annotations

import datetime
import json
import string
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from espl_jax.types import Conversation

_TODAY = datetime.datetime(2024, 7, 26)
"""The date given to templates (the default of Llama 3.2), so that a run has the same tokens on any day. The
template argument `date_string` overrides it, if the template uses it."""

# The macro shadows the function of this name that transformers passes to templates. Every line is a
# statement, whose newline transformers drops (`trim_blocks`), so the macro itself writes nothing.
_FIXED_DATE = """\
{% macro strftime_now(format) %}
{% set written = namespace(text=format.replace("%%", "\\x00")) %}
{% for code, value in CODES.items() %}
{% set written.text = written.text.replace(code, value) %}
{% endfor %}
{{- written.text.replace("\\x00", "%") -}}
{% endmacro %}
"""
_CODES = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters]
_FIXED_DATE = _FIXED_DATE.replace("CODES", json.dumps({code: _TODAY.strftime(code) for code in _CODES}))

_DEFAULT, WITH_TOOLS = "default", "tool_use"

TRIAL_TOOL = {
    "type": "function",
    "function": {"name": "a", "description": "", "parameters": {"type": "object", "properties": {}}},
}
"""A tool for probing templates."""


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, turns: Conversation, **arguments: Any) -> str:
    """Renders a conversation unchanged, with the generation prompt.

    Args:
      tokenizer: a tokenizer with one or several chat templates.
      turns: at least one.
      **arguments: arguments of the template; `tools` affects which template is used, see `template_for`.

    Raises:
      ValueError: as `template_for`.
      TemplateError: if the template rejects the conversation.
    """
    template = template_for(tokenizer, with_tools=bool(arguments.get("tools")))
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    text = tokenizer.apply_chat_template(
        turns, chat_template=template, tokenize=False, add_generation_prompt=True, **arguments
    )
    return cast(str, text)


def named_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns the tokenizer's chat templates by name; a single one is named `default`."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return {}
    return dict(template) if isinstance(template, dict) else {_DEFAULT: template}


def template_for(tokenizer: PreTrainedTokenizerBase, *, with_tools: bool) -> str:
    """Returns the template that transformers and servers would choose: `tool_use` if there are tools and a
    template of that name, otherwise `default`.

    Raises:
      ValueError: if there is no such template.
    """
    templates = named_templates(tokenizer)
    if not templates:
        raise ValueError("the tokenizer has no chat_template; use an instruction-tuned model, or set one")
    name = _chosen(templates, with_tools)
    if name not in templates:
        raise ValueError(
            f"chat_template={sorted(templates)}: none of the tokenizer's chat templates is named "
            f"{_DEFAULT!r}; save one as chat_template.jinja in the model's folder"
        )
    return templates[name]


def template_file(tokenizer: PreTrainedTokenizerBase, *, with_tools: bool) -> str:
    """Returns the file name of `template_for` in a folder written by `save_pretrained`."""
    name = _chosen(named_templates(tokenizer), with_tools)
    return "chat_template.jinja" if name == _DEFAULT else f"additional_chat_templates/{name}.jinja"


def _chosen(templates: dict[str, str], with_tools: bool) -> str:
    return WITH_TOOLS if with_tools and WITH_TOOLS in templates else _DEFAULT
