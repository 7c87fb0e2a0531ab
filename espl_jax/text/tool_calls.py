"""The calls of tools in what a model wrote, in the formats that models are trained to write them in."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from espl_jax.text.chat_template import named_templates, template_for

Call = dict[str, Any]
"""`{"name": str, "arguments": dict}`, or `{"error": str}` for a call that cannot be read."""


def calls_in(text: str, tool_format: str) -> list[Call]:
    """The calls of tools in a turn, in order.

    Args:
      text: the turn, special tokens included, thinking left out.
      tool_format: one of `FORMATS`.

    Returns:
      One for each call that was tried: where it cannot be read, its `error` says why, in words for the model.
    """
    return list(FORMATS[tool_format](text))


def tool_format_of(tokenizer: Any) -> str:
    """How the model calls tools, by what its chat template for tools writes: one of `FORMATS`."""
    template = template_for(tokenizer, with_tools=True) if named_templates(tokenizer) else ""
    for mark, tool_format in (
        ("<function=", "xml"),
        ("<tool_call>", "hermes"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|python_tag|>", "llama"),
        ('"parameters": ', "llama"),
    ):
        if mark in template:
            return tool_format
    return "hermes"


_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)


def _hermes(text: str) -> Iterator[Call]:
    """Qwen, Hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""
    for body in _TAGGED.findall(text):
        yield _from_json(body)


_FUNCTION = re.compile(r"<function=([^>\s]+)\s*>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)\s*>\n?(.*?)\n?(?:</parameter>|\Z)", re.DOTALL)


def _xml(text: str) -> Iterator[Call]:
    """Qwen3-Coder: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`.

    Values are text; one that is a JSON list or object is read as such.
    """
    for body in _TAGGED.findall(text):
        function = _FUNCTION.search(body)
        if function is None:
            yield {"error": "there is no <function=name> in the call"}
            continue
        arguments = {}
        for name, value in _PARAMETER.findall(function[2]):
            arguments[name] = value
            if value.lstrip().startswith(("[", "{")):
                with contextlib.suppress(ValueError, RecursionError):
                    arguments[name] = json.loads(value)
        yield {"name": function[1], "arguments": arguments}


def _mistral(text: str) -> Iterator[Call]:
    """Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}`."""
    for body in text.split("[TOOL_CALLS]")[1:]:
        name, separator, arguments = body.partition("[ARGS]")
        if separator:
            yield _from_json(json.dumps({"name": name.strip()})[:-1] + f', "arguments": {arguments}' + "}")
            continue
        try:
            calls = json.loads(body, strict=False)
        except ValueError as error:
            yield {"error": f"the call is not JSON ({error})"}
            continue
        for call in calls if isinstance(calls, list) else [calls]:
            yield _checked(call)


def _llama(text: str) -> Iterator[Call]:
    """Llama 3: the whole turn is `{"name": ..., "parameters": {...}}`, several with semicolons between."""
    tagged = "<|python_tag|>" in text
    body = text.rpartition("<|python_tag|>")[2].strip()
    if not (tagged or (body.startswith("{") and '"name"' in body)):
        return
    decoder = json.JSONDecoder(strict=False)
    while body:
        try:
            call, end = decoder.raw_decode(body)
        except ValueError as error:
            yield {"error": f"the call is not JSON ({error})"}
            return
        yield _checked(call)
        body = body[end:].lstrip("; \n\t")


def _from_json(body: str) -> Call:
    try:
        return _checked(json.loads(body, strict=False))
    except (ValueError, RecursionError) as error:
        return {"error": f"the call is not JSON ({error})"}


def _checked(call: Any) -> Call:
    if not isinstance(call, dict):
        return {"error": f"the call is a JSON {type(call).__name__}, and not an object"}
    if not isinstance(name := call.get("name"), str):
        return {"error": 'the call has no "name"'}
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False)
        except (ValueError, RecursionError):
            return {"error": 'the "arguments" of the call are not JSON'}
    if not isinstance(arguments, dict):
        return {"error": 'the "arguments" of the call are not an object'}
    return {"name": name, "arguments": arguments}


FORMATS: dict[str, Callable[[str], Iterator[Call]]] = {
    "hermes": _hermes,
    "xml": _xml,
    "mistral": _mistral,
    "llama": _llama,
}
"""How models write calls: name -> what reads them out of a turn."""
