"""Chat templates that speak under a system prompt unasked, against the templates they were made from."""

import copy

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from espl_jax.text.chat import has_system_role, render
from espl_jax.text.control_tokens import without_control_tokens
from espl_jax.text.template_defaults import with_default_system
from tests.support.messages import assistant, system, user

GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# What templates of the families do, in miniature; SmolLM2's own comes with the package.
TEMPLATES = {
    "llama3: trims, a header of its own": (
        "{{- bos_token }}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n"
        "{%- else %}\n"
        '    {%- set system_message = "" %}\n'
        "{%- endif %}\n"
        '{{- "<|system|>\\nCutting Knowledge Date: December 2023\\n\\n" + system_message + "<|eot|>" }}\n'
        "{%- for message in messages %}\n"
        "    {{- '<|' + message['role'] + '|>\\n\\n' + message['content'] | trim + '<|eot|>' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\\n\\n' }}{%- endif %}\n"
    ),
    "qwen2.5: a default of its own": (
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
        "{%- else %}\n"
        "    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n"
        "{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
        "    {%- elif message.role == 'assistant' %}\n"
        "        {{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n" + GENERATION
    ),
    "qwen3: counts the messages from behind, contents of parts": (
        "{%- if messages[0].role == 'system' %}\n"
        "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
        "{%- endif %}\n"
        "{%- set ns = namespace(last_query_index=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n"
        "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        "    {%- if message.role == 'user' %}{%- set ns.last_query_index = index %}{% break %}{%- endif %}\n"
        "{%- endfor %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.content is string %}{%- set content = message.content %}\n"
        "    {%- else %}{%- set content = message.content | map(attribute='text') | join %}{%- endif %}\n"
        "    {%- if message.role != 'system' or not loop.first %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' }}\n"
        "        {%- if loop.index0 > ns.last_query_index %}{{- '<think></think>' }}{%- endif %}\n"
        "        {{- content + '<|im_end|>\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n" + GENERATION
    ),
    "gemma3: the system text begins the first user turn": (
        "{{ bos_token }}\n"
        "{%- if messages[0]['role'] == 'system' -%}\n"
        "    {%- if messages[0]['content'] is string -%}\n"
        "        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}\n"
        "    {%- else -%}\n"
        "        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}\n"
        "    {%- endif -%}\n"
        "    {%- set loop_messages = messages[1:] -%}\n"
        "{%- else -%}\n"
        '    {%- set first_user_prefix = "" -%}\n'
        "    {%- set loop_messages = messages -%}\n"
        "{%- endif -%}\n"
        "{%- for message in loop_messages -%}\n"
        "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}\n"
        '        {{ raise_exception("Conversation roles must alternate") }}\n'
        "    {%- endif -%}\n"
        "    {{ '<start_of_turn>' + message['role'] + '\n' + (first_user_prefix if loop.first else '') }}\n"
        "    {%- if message['content'] is string -%}{{ message['content'] | trim }}\n"
        "    {%- else -%}{%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}\n"
        "    {%- endif -%}\n"
        "    {{ '<end_of_turn>\n' }}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}\n"
    ),
    "mistral: refuses system messages": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "drops system messages, takes parts": (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text | trim }}{% else %}<{{ part.type }}>{% endif %}{% endfor %}"
        "{% endif %}<|im_end|>\n{% endfor %}" + GENERATION
    ),
    "begins with white space": (
        "\n  \n   {% if true %} {{ messages[0].role }}{% endif %}\n"
        "   {% for m in messages %}\n   {{ m.role }}: {{ m.content }}\n   {% endfor %}\n" + GENERATION
    ),
}
NAMES = ["smollm2", *TEMPLATES]

PIECES = [*"'\"\\{}\n\t\0\x1b\x7f\x85\u2028\u2029\ufeffé漢🙂 x", "\\n", "\\u0041", "{{ messages }}", "\r\n"]
PIECES += [
    "{% endif %}",
    "{#",
    "#}",
    "-%}",
    "{% raw %}",
    "{% generation %}",
    "SYSTEM",
    "\\boxed{2}",
    "<|im_end|>",
]
texts = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


def parts(*contents):
    return [{"type": "text", "text": text} if text else {"type": "image"} for text in contents]


@pytest.fixture(scope="module")
def templates(smollm2_tokenizer):
    """Name -> a tokenizer with that template."""
    tokenizers = {"smollm2": smollm2_tokenizer}
    for name, template in TEMPLATES.items():
        tokenizers[name] = copy.copy(smollm2_tokenizer)
        tokenizers[name].chat_template = template
    return tokenizers


def exported(tokenizer, text):
    """The tokenizer whose template has the text as its default system message."""
    changed = copy.copy(tokenizer)
    said = without_control_tokens(tokenizer, text)
    template = with_default_system(tokenizer.chat_template, said, has_system_role(tokenizer))
    changed.chat_template = template
    return changed


def outcome(tokenizer, messages):
    """What a server gets: the text of a conversation, or the template's refusal."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", NAMES)
@given(texts, texts)
@settings(max_examples=40)
@example('She said "{{ 1 }}" \\n {% if %}', "hello")
@example(" \n indented\n", "  hello ")
def test_unasked_as_if_asked(templates, name, text, question):
    tokenizer = templates[name]
    unasked = exported(tokenizer, text)
    for turns in ([user(question)], [user("1"), assistant("2"), user(question)]):
        assert render(unasked, turns) == render(tokenizer, [system(text), *turns])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "turns",
    [
        [system("Mine."), user("1")],
        [system(""), user("1")],
        [system("Mine."), user("1"), assistant("2"), user("3")],
        [user("1"), assistant("2"), system("Mine."), user("3")],
        [{"role": "developer", "content": "Mine."}, user("1")],
    ],
)
def test_ones_own_system_message_stays(templates, name, turns):
    tokenizer = templates[name]
    assert outcome(exported(tokenizer, "Evolved."), turns) == outcome(tokenizer, turns)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content", [parts("1 + 1?"), parts("1", "2"), parts("", "1"), parts("1", ""), parts(""), [], None]
)
def test_contents_in_parts(templates, name, content):
    tokenizer = templates[name]
    plain, default = (
        outcome(tokenizer, [user(content)]),
        outcome(exported(tokenizer, "Evolved."), [user(content)]),
    )
    if plain.startswith(("TypeError", "TemplateError", "UndefinedError")):
        return
    assert "Evolved." in default
    if content == parts("1 + 1?"):
        assert default.index("Evolved.") < default.index("1 + 1?")


def test_parts_of_a_template_without_a_system_role(templates):
    tokenizer = exported(templates["drops system messages, takes parts"], "Evolved.")
    after = "<|im_end|>\n<|im_start|>assistant\n"
    for content, expected in {
        "text first": (parts("1 + 1?", "", "now"), "Evolved.\n\n1 + 1?<image>now"),
        "no text first": (parts("", "see"), "Evolved.<image>see"),
        "nothing": ([], "Evolved."),
    }.values():
        assert outcome(tokenizer, [user(content)]) == f"<|im_start|>user\n{expected}{after}"


def test_in_place_of_the_templates_own_default(templates):
    for name in ("smollm2", "qwen2.5: a default of its own"):
        before = render(templates[name], [user("1")])
        after = render(exported(templates[name], "Evolved."), [user("1")])
        assert "helpful" in before and "helpful" not in after
        assert after.count("system") == 1 and "<|im_start|>system\nEvolved.<|im_end|>" in after


def test_the_prompt_comes_once(templates):
    turns = [user("1"), assistant("2"), user("3"), assistant("4"), user("5")]
    for tokenizer in templates.values():
        assert render(exported(tokenizer, "Evolved."), turns).count("Evolved.") == 1


def test_the_first_turn_of_several_roles(templates):
    # The user's first turn need not be the first of all.
    tokenizer = templates["drops system messages, takes parts"]
    turns = [assistant("Hello."), user("1"), user("2")]
    assert render(exported(tokenizer, "E"), turns) == render(tokenizer, [system("E"), *turns])
    assert "Hello.<|im_end|>\n<|im_start|>user\nE\n\n1<|im_end|>" in render(exported(tokenizer, "E"), turns)


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_prompt_changes_nothing(blank):
    assert with_default_system("{{ messages }}", blank, True) == "{{ messages }}"


def test_readable():
    made = with_default_system("REST", 'Say "2 + 2 = 4".\nUse \\boxed{é}.', True)
    assert '"content": "Say \\"2 + 2 = 4\\".\\nUse \\\\boxed{é}."' in made
    assert made.endswith("{% endif %}\nREST")
