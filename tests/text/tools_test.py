"""Tools in chat templates of several kinds, reduced to what matters here."""

import copy
import json

import pytest

from espl_jax.text.chat import encode_conversation, render
from espl_jax.text.tools import between_turns, with_tools, writes_tools

TOOLS = ({"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}},)

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n"
    "{% elif not (tools and m.role == 'system') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>\n{% endif %}{% endif %}"
)
IN_USER_TURN = WITH_TOOLS.replace("{% if tools %}", "{% if tools and not tools_in_user_message %}").replace(
    "{% for m", "{% if tools_in_user_message is not defined %}{{ tools }}{% endif %}{% for m", 1
)
TOOL_TURNS_NEED_CALLS = WITH_TOOLS.replace(
    "{% if m.role == 'tool' %}", "{% if m.role == 'tool' %}{{ raise_exception('no call') if not m.id }}"
)
STRICT_TURNS = PLAIN.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('twice') }}{% endif %}",
)


@pytest.fixture
def with_template(smollm2_tokenizer):
    def build(template):
        tokenizer = copy.deepcopy(smollm2_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return build


def rendered(tokenizer, messages, **kwargs):
    messages, kwargs = with_tools(tokenizer, messages, TOOLS, **kwargs)
    return render(tokenizer, messages, **kwargs)


USER = {"role": "user", "content": "Who?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def test_templates_that_know_tools_show_them(with_template):
    tokenizer = with_template(WITH_TOOLS)
    assert writes_tools(tokenizer, TOOLS)
    expected = f"<|im_start|>system\nBe brief.\n\n# Tools\n{json.dumps(TOOLS[0])}\n<|im_end|>\n"
    assert rendered(tokenizer, [SYSTEM, USER]).startswith(expected)
    assert rendered(tokenizer, [USER]).startswith("<|im_start|>system\n# Tools\n")
    assert rendered(tokenizer, [USER], thinking=True).endswith("<think>\n")


def test_a_template_for_tools_is_used_where_there_is_one(with_template):
    tokenizer, alone = with_template({"default": PLAIN, "tool_use": WITH_TOOLS}), with_template(WITH_TOOLS)
    assert writes_tools(tokenizer, TOOLS)
    assert rendered(tokenizer, [SYSTEM, USER]) == rendered(alone, [SYSTEM, USER])
    said = between_turns(tokenizer, RESULTS, TOOLS, "<|im_end|>")
    assert said == between_turns(alone, RESULTS, TOOLS, "<|im_end|>")


def test_tools_stand_in_the_system_turn_and_not_with_the_user(with_template):
    """Llama's templates put them into the first user turn unless they are asked not to."""
    tokenizer = with_template(IN_USER_TURN)
    messages, kwargs = with_tools(tokenizer, [USER], TOOLS)
    system, rest = encode_conversation(tokenizer, messages, **kwargs)
    assert '"search"' in tokenizer.decode(system) and '"search"' not in tokenizer.decode(rest)


@pytest.mark.parametrize("messages", [[SYSTEM, USER], [USER]], ids=["system", "none"])
def test_templates_without_tools_have_them_described(with_template, messages):
    tokenizer = with_template(PLAIN)
    assert not writes_tools(tokenizer, TOOLS)
    system, user = rendered(tokenizer, messages).split("<|im_end|>\n")[:2]
    assert system.startswith(f"<|im_start|>system\n{'Be brief.' * (len(messages) - 1)}")
    assert json.dumps(TOOLS[0]["function"]) in system and "<tool_call>" in system
    assert user == "<|im_start|>user\nWho?"


def test_without_tools_nothing_changes(with_template):
    same = with_tools(with_template(WITH_TOOLS), [SYSTEM, USER], (), thinking=True)
    assert same == ([SYSTEM, USER], {"thinking": True})


RESULTS = [{"role": "tool", "content": "Ada.", "error": "x"}, {"role": "tool", "content": "Bob."}]
IN_ONE_TURN = "<tool_response>\nAda.\n</tool_response>\n<tool_response>\nBob.\n</tool_response>"


@pytest.mark.parametrize("template", [PLAIN, STRICT_TURNS, TOOL_TURNS_NEED_CALLS])
def test_results_come_in_a_user_turn_where_tools_have_none(with_template, template):
    said = between_turns(with_template(template), RESULTS, TOOLS, "<|im_end|>")
    assert said == f"\n<|im_start|>user\n{IN_ONE_TURN}<|im_end|>\n<|im_start|>assistant\n"


def test_results_come_as_the_template_writes_them(with_template):
    response = "<|im_start|>user\n<tool_response>\n{}.\n</tool_response><|im_end|>\n"
    turns = [response.format(name) for name in ("Ada", "Bob")]
    said = between_turns(with_template(WITH_TOOLS), RESULTS, TOOLS, "<|im_end|>")
    assert said == f"\n{''.join(turns)}<|im_start|>assistant\n"
    assert between_turns(with_template(WITH_TOOLS), RESULTS, TOOLS, "", thinking=True).endswith("<think>\n")


@pytest.mark.parametrize("ended_by", ["<|im_end|>", ""], ids=["itself", "otherwise"])
def test_the_end_of_the_models_turn_is_written_once(with_template, ended_by):
    """Together with what the model wrote this is the template's own text of the whole conversation."""
    tokenizer = with_template(PLAIN)
    said = between_turns(tokenizer, [{"role": "user", "content": "And?"}], (), ended_by)
    turns = [USER, {"role": "assistant", "content": "Ada."}, {"role": "user", "content": "And?"}]
    assert render(tokenizer, [USER]) + "Ada." + ended_by + said == render(tokenizer, turns)


def test_a_template_that_refuses_the_conversation_is_an_error(with_template):
    with pytest.raises(ValueError, match="the chat template rejects this conversation: never"):
        between_turns(with_template("{{ raise_exception('never') }}"), RESULTS, TOOLS, "")
