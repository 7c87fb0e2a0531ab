import dataclasses
import json
from types import SimpleNamespace

import pytest

from espl_jax.text.tool_calls import FORMATS, calls_in, tool_format_of

ARGUMENTS = '{"query_list": ["Ada", "a {brace}"]}'
CALL = {"name": "search", "arguments": {"query_list": ["Ada", "a {brace}"]}}
JSON = '{"name": "search", "arguments": {"query_list": ["Ada", "a {brace}"]}}'


@dataclasses.dataclass
class Written:
    """One call as a model of each format writes it."""

    tool_format: str
    text: str


CALLS = [
    Written("hermes", f"I look it up.\n<tool_call>\n{JSON}\n</tool_call>"),
    Written("hermes", f"<tool_call>{JSON}"),
    Written("hermes", f"<tool_call>{JSON.replace('{', '{ ', 1)}</tool_call> and more"),
    Written("hermes", f"<tool_call>{json.dumps({'name': 'search', 'arguments': ARGUMENTS})}</tool_call>"),
    Written(
        "xml",
        "<tool_call>\n<function=search>\n<parameter=query_list>\n"
        '["Ada", "a {brace}"]\n</parameter>\n</function>\n</tool_call>',
    ),
    Written("mistral", f"[TOOL_CALLS][{JSON}]"),
    Written("mistral", f"[TOOL_CALLS] {JSON}"),
    Written("mistral", '[TOOL_CALLS]search[ARGS]{"query_list": ["Ada", "a {brace}"]}'),
    Written("mistral", 'I look it up: search[ARGS]{"query_list": ["Ada", "a {brace}"]}'),
    Written("mistral", '[TOOL_CALLS]search[CALL_ID]a1[ARGS]{"query_list": ["Ada", "a {brace}"]}'),
    Written("llama", JSON.replace("arguments", "parameters")),
    Written("llama", f"<|python_tag|>{JSON.replace('arguments', 'parameters')}"),
]


@pytest.mark.parametrize("written", CALLS, ids=lambda written: written.tool_format)
def test_a_call_in_every_format(written):
    assert calls_in(written.text, written.tool_format) == [CALL]


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        ("hermes", f"<tool_call>{JSON}</tool_call>\n<tool_call>{JSON}</tool_call>"),
        ("hermes", f"<tool_call>{JSON}<tool_call>{JSON}"),
        ("mistral", f"[TOOL_CALLS][{JSON}, {JSON}]"),
        ("mistral", f"search[ARGS]{ARGUMENTS}\nsearch[ARGS]{ARGUMENTS}"),
        ("mistral", f"[TOOL_CALLS]search[ARGS]{ARGUMENTS}search[ARGS]{ARGUMENTS}"),
        ("llama", f"{JSON}; {JSON}"),
    ],
)
def test_several_calls_keep_their_order(tool_format, text):
    second = text[::-1].replace("Ada"[::-1], "Bob"[::-1], 1)[::-1]
    first, last = calls_in(second, tool_format)
    assert first == CALL and last["arguments"]["query_list"][0] == "Bob"


TAGS = "</tool_call> <tool_call> </function> </parameter> [TOOL_CALLS] [ARGS] <|python_tag|>"


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        ("hermes", "<tool_call>{}</tool_call>"),
        ("mistral", "[TOOL_CALLS][{}]"),
        ("llama", "{}"),
        ("llama", "<|python_tag|>{}"),
    ],
)
def test_arguments_may_hold_tags(tool_format, text):
    call = {"name": "search", "arguments": {"query": f'{TAGS} "{TAGS}"'}}
    written = text.replace("{}", json.dumps(call))
    assert calls_in(written, tool_format) == [call]
    assert (
        calls_in(f"{written};{written}" if tool_format == "llama" else written * 2, tool_format) == [call] * 2
    )


def test_arguments_after_a_name_may_hold_tags():
    text = f"[TOOL_CALLS]search[ARGS]{json.dumps({'query': TAGS})}" * 2
    assert calls_in(text, "mistral") == [{"name": "search", "arguments": {"query": TAGS}}] * 2


def test_parameters_may_hold_tags():
    call = {"name": "search", "arguments": {"query": f"{TAGS} and more", "count": "1"}}
    parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in call["arguments"].items())
    written = f"<tool_call>\n<function=search>\n{parameters}</function>\n</tool_call>\n"
    assert calls_in(written * 2, "xml") == [call] * 2


@pytest.mark.parametrize(
    "text",
    [
        "<function=search>\n<parameter=query>\nAda\n</parameter>\n</function>\n</tool_call>",
        "I look.\n<function=search><parameter=query>Ada</parameter></function>",
        "<function=search>\n<parameter=query>\nAda\n</function>\n</tool_call>",
        "<tool_call>\n<function=search>\n<parameter=query>\nAda\n",
    ],
)
def test_a_function_without_some_of_its_tags(text):
    assert calls_in(text, "xml") == [{"name": "search", "arguments": {"query": "Ada"}}]


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize("text", ["", "Answer: Ada", "{", "Answer: {x}", "[1]", "<tool_response>x"])
def test_text_without_a_call(tool_format, text):
    assert calls_in(text, tool_format) == []


@pytest.mark.parametrize(
    ("tool_format", "text", "error"),
    [
        ("hermes", "<tool_call>search Ada</tool_call>", "not JSON"),
        ("hermes", '<tool_call>["search"]</tool_call>', "a JSON list, and not an object"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', 'no "name"'),
        ("hermes", '<tool_call>{"name": "search", "arguments": ["Ada"]}</tool_call>', "not an object"),
        ("hermes", '<tool_call>{"name": "search", "arguments": "Ada"}</tool_call>', "not JSON"),
        ("hermes", "<tool_call>" + "[" * 100_000, "not JSON"),
        ("hermes", "<tool_call>", "not JSON"),
        ("hermes", f"<tool_call>{JSON} and more</tool_call>", "not JSON (more follows"),
        ("hermes", f"{JSON}</tool_call>", "no <tool_call> before"),
        ("hermes", '<tool_call>{"name": ' + "9" * 5000 + "}</tool_call>", "not JSON"),
        ("xml", "search Ada</tool_call>", "no <function=name>"),
        ("xml", "<parameter=q>x</parameter>\n</function>", "no <function=name>"),
        ("xml", "<tool_call><parameter=q>x</parameter></function></tool_call>", "no <function=name>"),
        ("xml", "<function=><parameter=q>x</parameter></function>", "no <function=name>"),
        ("xml", "<function search>\n<parameter=q>x</parameter></function></tool_call>", "no <function=name>"),
        ("xml", "q: x\n</function>\n</tool_call>", "no <function=name>"),
        ("mistral", '[ARGS]{"q": "x"}', 'no "name"'),
        ("xml", "<tool_call>", "no <function=name>"),
        ("mistral", "[TOOL_CALLS]" + "[" * 100_000, "not JSON"),
        ("llama", "<|python_tag|>" + "[" * 100_000, "not JSON"),
        ("xml", f"<tool_call>{JSON}</tool_call>", "no <function=name>"),
        ("mistral", "[TOOL_CALLS]search it", "not JSON"),
        ("mistral", "[TOOL_CALLS]search[ARGS]Ada", "not JSON"),
        ("llama", "<|python_tag|>search('Ada')", "not JSON"),
        ("llama", '{"name": "search", "parameters": {"query_list": ["Ada"', "not JSON"),
    ],
)
def test_what_cannot_be_read_says_why(tool_format, text, error):
    (call,) = calls_in(text, tool_format)
    assert set(call) == {"error"} and error in call["error"]


XML = "<function=search><parameter=query_list>[]</parameter></function></tool_call>"


@pytest.mark.parametrize(
    ("tool_format", "first", "second"),
    [
        ("hermes", f"<tool_call>{JSON}</tool_call>\n", f"{JSON}</tool_call>"),
        ("xml", f"<tool_call>{XML}\n", f"{XML.replace('<function=search>', '')}"),
        ("xml", f"<tool_call>{XML}\n", f"{JSON}</tool_call>"),
    ],
)
def test_a_call_without_its_beginning_after_another_is_not_lost(tool_format, first, second):
    for text in (first + second, first * 2 + second, first + second + first):
        calls = calls_in(text, tool_format)
        assert len(calls) == text.count("</tool_call>") and sum("error" in call for call in calls) == 1
    assert "error" not in calls[0] and "error" in calls[1]


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [("hermes", f"<tool_call>{JSON}</tool_call>"), ("xml", f"<tool_call>{XML}")],
)
def test_repeated_ends_are_no_calls(tool_format, text):
    assert len(calls_in(f"{text}\n</tool_call>", tool_format)) == 1


@pytest.mark.parametrize(
    ("template", "tool_format"),
    [
        ("... <tool_call>\\n{{ tool_call | tojson }}\\n</tool_call>", "hermes"),
        ("<tool_call>\\n<function=example>", "xml"),
        ("[AVAILABLE_TOOLS] ... [TOOL_CALLS]", "mistral"),
        ("""{{- '"parameters": ' }}""", "llama"),
        ("no tools at all", "hermes"),
        (None, "hermes"),
        ({"default": "[TOOL_CALLS]", "tool_use": "<function=example>"}, "xml"),
        ({"default": "[TOOL_CALLS]", "rag": "<function=example>"}, "mistral"),
    ],
)
def test_the_format_is_that_of_the_template(template, tool_format):
    assert tool_format_of(SimpleNamespace(chat_template=template)) == tool_format
