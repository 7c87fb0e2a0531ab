"""Parses tool calls in the output of a model, in the formats that models are trained on."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from espl_jax.text import harmony
from espl_jax.text.chat_template import named_templates, template_for

Call = dict[str, Any]
"""`{"name": str, "arguments": dict}`, or `{"error": str}` for a call that cannot be read."""


def calls_in(text: str, tool_format: str) -> list[Call]:
    """Returns the tool calls of a turn, in order.

    Args:
      text: the turn, with special tokens and without thinking.
      tool_format: one of `FORMATS`.

    Returns:
      One entry for each attempted call. If a call is malformed, its `error` tells the model why.
    """
    return list(FORMATS[tool_format](text))


def tool_format_of(tokenizer: Any) -> str:
    """Returns the tool format (one of `FORMATS`) of a model, derived from its chat template for tools."""
    template = template_for(tokenizer, with_tools=True) if named_templates(tokenizer) else ""
    for mark, tool_format in (
        (harmony.CHANNEL, "harmony"),
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
    """Returns the JSON value at a position, after whitespace, and the position of its end.

    Tags do not end the value, since strings may contain them. Raises ValueError.
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
    """Yields the JSON calls that follow tags, each up to a match of `end`.

    Args:
      text: a turn.
      tag: pattern of the tag; its group is the name of the call whose arguments follow, or empty.
      end: pattern of the end of a call; must also match at the end of the text.
      lists: whether a tag may be followed by a list of calls.
      between: yields errors in the text between calls; its second argument is True before the first call.
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
    """Yields an error for each `</tool_call>` without `<tool_call>` between calls; ignores repeated tags."""
    *ended, _ = text.split("</tool_call>")
    for number, content in enumerate(ended):
        if content.strip() or (first and number == 0):
            yield {"error": "there is no <tool_call> before </tool_call>"}


# A function tag without a name, or a parameter or end tag without a function, is an attempted call.
_XML_TAG = re.compile(
    r"<function=(?P<name>[^>\s]+)\s*>|(?P<unnamed><function(?=[\s=>])[^<>\n]*>)"
    r"|(?P<parameter><parameter(?=[\s=>]))|(?P<end></function>)|</?tool_call>"
)
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\s]+)\s*>\n?(.*?)\n?"
    # A value may contain such tags: it ends only where the call continues or ends.
    r"(?:</parameter>(?=\s*(?:<parameter=|</function>|</?tool_call>|\Z))"
    r"|(?=</function>\s*(?:</?tool_call>|<function=|\Z))|\Z)",
    re.DOTALL,
)


def _xml(text: str) -> Iterator[Call]:
    """Qwen3-Coder: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`.

    Values are text; JSON lists and objects are parsed. The tags around the function may be missing.
    """
    empty = {"error": "there is no <function=name> in the call"}
    position, before = 0, ""
    # opened: after <tool_call>; inside: within a function or its parameters; called: after any call.
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
    """Returns the parameters at a position, and the position of their end."""
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
# A name and [ARGS] are a call even without a preceding [TOOL_CALLS].
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
    """Llama 3: the whole turn is `{"name": ..., "parameters": {...}}`, or several with semicolons."""
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


def _harmony(text: str) -> Iterator[Call]:
    """gpt-oss: `<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>`."""
    for message in harmony.messages(text):
        if not message.recipient:
            continue
        try:
            arguments, end = _json_at(message.content, 0)
            if message.content[end:].strip():
                raise ValueError("more follows it")
        except ValueError as error:
            yield {"error": f"the call is not JSON ({error})"}
        else:
            yield _checked({"name": message.recipient, "arguments": arguments})


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
    "harmony": _harmony,
}
"""Tool format -> parser of the calls in a turn."""
