"""A byte-level tokenizer with gpt-oss' special tokens, and a chat template in its format.

The template follows OpenAI's description of the harmony response format. Like the published one, it takes a
system message as instructions of the developer, drops the analysis of turns before a reply, writes results
of tools only after a call, and refuses channels in texts.
"""

import copy
import functools

from tests.support import fakes

TEMPLATE = """\
{{- "<|start|>system<|message|>You are ChatGPT.\\nCurrent date: " + strftime_now("%Y-%m-%d") }}
{{- "\\n\\nReasoning: " + (reasoning_effort or "medium") }}
{{- "\\n\\n# Valid channels: analysis, commentary, final." }}
{%- if tools %}{{- "\\nCalls to these tools must go to the commentary channel: 'functions'." }}{%- endif %}
{{- "<|end|>" }}
{%- set instructions, rest = "", messages %}
{%- if messages[0].role in ("developer", "system") %}
{%- set instructions, rest = messages[0].content, messages[1:] %}
{%- endif %}
{%- if instructions or tools %}
{{- "<|start|>developer<|message|>" }}
{%- if instructions %}{{- "# Instructions\\n\\n" + instructions + "\\n\\n" }}{%- endif %}
{%- if tools %}
{{- "# Tools\\n\\n## functions\\n\\nnamespace functions {\\n\\n" }}
{%- for tool in tools %}{{- "type " + tool.function.name + " = (_: any) => any;\\n\\n" }}{%- endfor %}
{{- "} // namespace functions" }}
{%- endif %}
{{- "<|end|>" }}
{%- endif %}
{%- set called = namespace(name=none) %}
{%- for message in rest %}
{%- if "<|channel|>" in message.content %}{{- raise_exception("channels in a text") }}{%- endif %}
{%- if message.role == "assistant" and "tool_calls" in message %}
{%- set call = message.tool_calls[0].function %}
{%- if message.thinking and not rest[loop.index:] | selectattr("role", "equalto", "user") | list %}
{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
{%- endif %}
{{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
{{- call.arguments | tojson + "<|call|>" }}
{%- set called.name = call.name %}
{%- elif message.role == "assistant" %}
{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
{%- set called.name = none %}
{%- elif message.role == "tool" %}
{%- if called.name is none %}{{- raise_exception("a tool message without a call before it") }}{%- endif %}
{{- "<|start|>functions." + called.name + " to=assistant<|channel|>commentary<|message|>" }}
{{- message.content | tojson + "<|end|>" }}
{%- else %}
{{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{%- endif %}"""

SPECIAL = ("start", "end", "message", "channel", "constrain", "return", "call")


@functools.cache
def tokenizer():
    """One token a byte, and the special tokens; `<|return|>` is the end of a sequence."""
    built = copy.deepcopy(fakes.tokenizer())
    built.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in SPECIAL]})
    built.eos_token = "<|return|>"
    built.chat_template = TEMPLATE
    return built


def stop_ids():
    return tuple(tokenizer().convert_tokens_to_ids(["<|return|>", "<|call|>", "<|endoftext|>"]))
