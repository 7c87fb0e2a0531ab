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


_DECODER = json.JSONDecoder(strict=False)


def _json_at(text: str, position: int) -> tuple[Any, int]:
    """The JSON value that begins at a position, white space aside, and where it ends.

    Tags are no ends: strings may hold them. Raises ValueError.
    """
    while text[position : position + 1].isspace():
        position += 1
    try:
        return _DECODER.raw_decode(text, position)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _after_tags(
    text: str,
    tag: re.Pattern,
    end: re.Pattern,
    lists: bool = False,
    between: Callable[[str, bool], Iterator[Call]] = lambda text, first: iter(()),
) -> Iterator[Call]:
    """The calls in JSON that follow tags, each up to what matches `end`.

    Args:
      text: a turn.
      tag: its group is the name of the call whose arguments follow, or empty.
      end: matches at the end of the text, too.
      lists: a tag may be followed by a list of calls.
      between: yields the errors in text outside calls; told whether it comes before any call.
    """
    position, first = 0, True
    while opening := tag.search(text, position):
        yield from between(text[position : opening.start()], first)
        position, first = opening.end(), False
        try:
            value, position = _json_at(text, position)
            ending = end.search(text, position)
            if text[position : ending.start()].strip():
                raise ValueError("more follows it")
        except ValueError as error:
            ending = end.search(text, position)
            yield {"error": f"the call is not JSON ({error})"}
        else:
            name = (opening["name"] or "").strip()
            values = value if lists and isinstance(value, list) and not name else [value]
            for each in values:
                yield _checked({"name": name, "arguments": each} if name else each)
        position = ending.end()
    yield from between(text[position:], first)


_HERMES_TAG = re.compile(r"<tool_call>(?P<name>)")
_HERMES_END = re.compile(r"</tool_call>|(?=<tool_call>)|\Z")


def _hermes(text: str) -> Iterator[Call]:
    """Qwen, Hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""
    yield from _after_tags(text, _HERMES_TAG, _HERMES_END, between=_unopened)


def _unopened(text: str, first: bool) -> Iterator[Call]:
    """What `</tool_call>` ends without `<tool_call>`, in text between calls; a repeated tag ends nothing."""
    *ended, _ = text.split("</tool_call>")
    for number, content in enumerate(ended):
        if content.strip() or (first and number == 0):
            yield {"error": "there is no <tool_call> before </tool_call>"}


# A tag of a function without a name, and a parameter or an end without a function, are calls that were tried.
_XML_TAG = re.compile(
    r"<function=(?P<name>[^>\s]+)\s*>|(?P<unnamed><function(?=[\s=>])[^<>\n]*>)"
    r"|(?P<parameter><parameter(?=[\s=>]))|(?P<end></function>)|</?tool_call>"
)
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\s]+)\s*>\n?(.*?)\n?"
    # A value may hold such tags, too: it ends where the call goes on, or ends.
    r"(?:</parameter>(?=\s*(?:<parameter=|</function>|</?tool_call>|\Z))"
    r"|(?=</function>\s*(?:</?tool_call>|<function=|\Z))|\Z)",
    re.DOTALL,
)


def _xml(text: str) -> Iterator[Call]:
    """Qwen3-Coder: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`.

    Values are text; one that is a JSON list or object is read as such. Tags around the function may be
    missing.
    """
    empty = {"error": "there is no <function=name> in the call"}
    position, before = 0, ""
    # After <tool_call>; within a function, or what stands for one; after any call.
    opened, inside, called = False, False, False
    while tag := _XML_TAG.search(text, position):
        blank = not text[position : tag.start()].strip()
        last, before = before, tag.group()
        position = tag.end()
        if tag["name"] or tag["unnamed"] or (tag["parameter"] and not inside):
            arguments, position = _parameters(text, tag.start() if tag["parameter"] else tag.end())
            position = max(position, tag.end())
            yield {"name": tag["name"], "arguments": arguments} if tag["name"] else empty
            opened, inside, called = False, True, True
        elif tag["end"]:
            if not inside and not (last == "</function>" and blank):
                yield empty
                opened, called = False, True
            inside = False
        elif not tag["parameter"]:
            closes = tag.group() == "</tool_call>"
            if opened or (closes and (not called or (last == "</tool_call>" and not blank))):
                yield empty
            opened, inside = not closes, False
            called = called or closes
    if opened:
        yield empty


def _parameters(text: str, position: int) -> tuple[dict[str, Any], int]:
    """The parameters that begin at a position, and where they end."""
    arguments = {}
    while parameter := _PARAMETER.match(text, position):
        position = parameter.end()
        arguments[parameter[1]] = _parameter_value(parameter[2])
    return arguments, position


def _parameter_value(text: str) -> Any:
    if text.lstrip().startswith(("[", "{")):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    return text


_MISTRAL_ARGUMENTS = r"(?:\[CALL_ID\][\w-]*)?\[ARGS\]"
# A name and [ARGS] are a call also without [TOOL_CALLS] before them.
_MISTRAL_TAG = re.compile(
    rf"\[TOOL_CALLS\](?![^\[{{]*{_MISTRAL_ARGUMENTS})"
    rf"|(?P<name>(?<=\[TOOL_CALLS\])[^\[{{]*|(?<![\w.-])[\w.-]*){_MISTRAL_ARGUMENTS}"
)
_MISTRAL_END = re.compile(rf"(?=\[TOOL_CALLS\])|(?=(?<![\w.-])[\w.-]*{_MISTRAL_ARGUMENTS})|\Z")


def _mistral(text: str) -> Iterator[Call]:
    """Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}`."""
    yield from _after_tags(text, _MISTRAL_TAG, _MISTRAL_END, lists=True)


_LLAMA_TAG = "<|python_tag|>"


def _llama(text: str) -> Iterator[Call]:
    """Llama 3: the whole turn is `{"name": ..., "parameters": {...}}`, several with semicolons between."""
    body = text.strip()
    if not (body.startswith("{") and '"name"' in body):
        body = body.partition(_LLAMA_TAG)[2].strip()
    while body:
        try:
            call, end = _json_at(body, 0)
        except ValueError as error:
            yield {"error": f"the call is not JSON ({error})"}
            return
        yield _checked(call)
        body = body[end:].lstrip("; \n\t").removeprefix(_LLAMA_TAG).lstrip()


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
