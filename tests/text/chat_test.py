import copy
import datetime
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.text.chat import cut_middle, encode, encode_conversation, has_system_role, render
from espl_jax.text.chat_template import template_for
from tests.support.messages import assistant, system, user

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think is false %}<think></think>{% endif %}"
    "{% endif %}"
)
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML
)
DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant{{ '\\n' }}"  # Jinja drops a newline that ends the template
)
NO_SPECIAL_TOKENS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
IGNORES_USER = "<|im_start|>assistant\n"

texts = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            ["<|im_start|>", "<|im_end|>", "\n", " ", "{", "}}", "{{ x }}", "{% if %}", "\\boxed{", "a", "b"]
        )
    ).map("".join),
)


@pytest.fixture(scope="module")
def with_template(smollm2_tokenizer):
    def build(template):
        tokenizer = copy.copy(smollm2_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return build


class TestRender:
    def test_the_models_own_template(self, smollm2_tokenizer):
        assert render(smollm2_tokenizer, [system("Add."), user("1 + 1")]) == (
            "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n"
        )

    @pytest.mark.parametrize("blank", ["", " \n"])
    def test_a_blank_system_prompt_is_no_system_turn(self, smollm2_tokenizer, with_template, blank):
        without = render(smollm2_tokenizer, [user("1 + 1")])
        assert "named SmolLM" in without
        assert render(smollm2_tokenizer, [system(blank), user("1 + 1")]) == without
        no_default = with_template(CHATML)
        assert render(no_default, [system(blank), user("1")]) == (
            "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_an_opening_is_continued_as_it_stands(self, smollm2_tokenizer):
        messages = [user("List."), assistant("Yes."), user("More."), assistant("[\n  {")]
        text = render(smollm2_tokenizer, messages)
        assert text == render(smollm2_tokenizer, messages[:-1]) + "[\n  {"
        assert "assistant\nYes.<|im_end|>" in text

    @pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
    def test_without_a_system_role_the_user_turn_begins_with_it(self, with_template, template):
        tokenizer = with_template(template)
        assert not has_system_role(tokenizer)
        text = render(tokenizer, [system("Add."), user("Add. 1 + 1"), assistant("2"), user("2 + 2")])
        assert text == (
            "<|im_start|>user\nAdd.\n\nAdd. 1 + 1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
            "<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_template_arguments_pass_through(self, with_template):
        tokenizer = with_template(CHATML)
        assert has_system_role(tokenizer)
        assert render(tokenizer, [user("1")], think=False).endswith("<think></think>")
        assert render(tokenizer, [user("1")], think=True).endswith("assistant\n")

    def test_refusals(self, with_template):
        tokenizer = with_template(CHATML)
        for messages in ([], [system("Add.")], [system("Add."), assistant("2")]):
            with pytest.raises(ValueError, match="no user turn"):
                render(tokenizer, messages)
        with pytest.raises(ValueError, match="no chat_template"):
            render(with_template(None), [user("1")])
        with pytest.raises(
            ValueError, match="the chat template rejects this conversation: always; use another"
        ):
            render(with_template("{{ raise_exception('always') }}"), [user("1")])


class TestEncodeConversation:
    def test_smollm2_by_hand(self, smollm2_tokenizer):
        first, rest = encode_conversation(smollm2_tokenizer, [system("Hi"), user("7 + 8")])
        assert smollm2_tokenizer.convert_ids_to_tokens(first) == [
            *("<|im_start|>", "system", "Ċ", "Hi", "<|im_end|>", "Ċ", "<|im_start|>")
        ]
        assert smollm2_tokenizer.convert_ids_to_tokens(rest) == [
            *("user", "Ċ", "7", "Ġ+", "Ġ", "8", "<|im_end|>", "Ċ", "<|im_start|>", "ass", "istant", "Ċ")
        ]

    @given(texts, texts, texts)
    def test_parts_are_the_whole_and_the_cut_knows_no_problem(self, smollm2_tokenizer, one, two, three):
        firsts = set()
        for text in (two, three):
            messages = [system(one), user(text)]
            first, rest = encode_conversation(smollm2_tokenizer, messages)
            assert first + rest == encode(smollm2_tokenizer, render(smollm2_tokenizer, messages))
            assert first
            assert rest
            firsts.add(tuple(first))
        assert len(firsts) == 1
        assert smollm2_tokenizer.decode(first).endswith("<|im_end|>\n<|im_start|>")

    @pytest.mark.parametrize("template", [CHATML, REFUSES_SYSTEM, DROPS_SYSTEM, NO_SPECIAL_TOKENS])
    @given(one=texts, two=texts, three=texts)
    def test_every_template(self, with_template, template, one, two, three):
        tokenizer = with_template(template)
        cuts = set()
        for text in (two, three):
            messages = [system(one), user("before"), assistant("yes"), user(text), assistant("[")]
            first, rest = encode_conversation(tokenizer, messages)
            assert first + rest == encode(tokenizer, render(tokenizer, messages))
            assert rest
            cuts.add(tuple(first))
        if template == NO_SPECIAL_TOKENS:
            # The texts may join what is before them, so that one conversation can share more than another.
            short, long = sorted(cuts, key=len)[0], sorted(cuts, key=len)[-1]
            assert long[: len(short)] == short
        else:
            assert len(cuts) == 1
            assert tokenizer.decode(first).endswith("yes<|im_end|>\n<|im_start|>")

    def test_a_short_system_text_stays_with_the_problem_where_it_shares_its_turn(self, with_template):
        first, rest = encode_conversation(with_template(REFUSES_SYSTEM), [system("Add."), user("1")])
        assert with_template(CHATML).decode(first) == "<|im_start|>"
        assert with_template(CHATML).decode(rest).startswith("user\nAdd.\n\n1<|im_end|>")

    @pytest.mark.parametrize("template", [REFUSES_SYSTEM, NO_SPECIAL_TOKENS])
    @pytest.mark.parametrize("text", ["What is 12 + 30?", "12", "a", "b", "  3", "+", ""])
    def test_a_long_one_is_shared_all_the_same(self, with_template, template, text):
        tokenizer, prompt = (
            with_template(template),
            "Add the numbers, carrying with care. " * 4 + "Thank you.",
        )
        first, rest = encode_conversation(tokenizer, [system(prompt), user(text)])
        assert "carrying with care. Thank you" in tokenizer.decode(first)
        assert len(tokenizer.decode(rest)) < len(text) + 60
        assert first + rest == encode(tokenizer, render(tokenizer, [system(prompt), user(text)]))

    def test_a_text_that_joins_the_prompt_shares_less_of_it(self, with_template):
        """The line breaks between prompt and text are one token here, and with one more another token."""
        tokenizer = with_template(REFUSES_SYSTEM)
        messages = [system("one two three four " * 6 + "."), user("\n\nx")]
        first, rest = encode_conversation(tokenizer, messages)
        assert first + rest == encode(tokenizer, render(tokenizer, messages))
        assert tokenizer.decode(first).count("four") >= 5

    def test_every_added_token_is_a_place_to_cut(self, smollm2_tokenizer):
        tokenizer = copy.deepcopy(smollm2_tokenizer)
        tokenizer.chat_template = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
        )
        tokenizer.add_tokens(["[system]", "[user]", "[assistant]"])
        first, rest = encode_conversation(tokenizer, [system("Add."), user("1 + 2")])
        assert (tokenizer.decode(first), tokenizer.decode(rest)) == ("[system]Add.[user]", "1 + 2[assistant]")


class TestDate:
    TEMPLATE = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }} {{ messages[0].content }}"
    )

    def test_it_is_the_same_tomorrow(self, with_template):
        assert render(with_template(self.TEMPLATE), [user("Hi")]) == "26 Jul 2024 Hi"

    def test_it_can_be_given(self, with_template):
        tokenizer = with_template(self.TEMPLATE)
        assert render(tokenizer, [user("Hi")], date_string="1 Jan 2030") == "1 Jan 2030 Hi"

    @pytest.mark.parametrize(
        "asks",
        [
            "{% set written = '%d %b %Y' %}{{ strftime_now(written) }}",
            "{% set now = strftime_now %}{{ now('%d %b ' ~ '%Y') }}",
            "{% macro date(written='%d %b %Y') %}{{ strftime_now(written) }}{% endmacro %}{{ date() }}",
            "{{ strftime_now(\n  format if format else '%d %b %Y'\n) }}",
        ],
        ids=["variable", "another name", "macro", "expression"],
    )
    def test_it_is_the_same_however_the_template_asks(self, with_template, asks):
        assert render(with_template(asks + " {{ messages[0].content }}"), [user("Hi")]) == "26 Jul 2024 Hi"

    @pytest.mark.parametrize("written", ["%A, %-d.%-m.%y %H:%M", "100%% %Y-%m-%dT%X", "%%d", "no date", "%"])
    def test_any_format(self, with_template, written):
        tokenizer = with_template("\n  {% if 1 %}{{ strftime_now(messages[0].content) }}|{% endif %}")
        expected = datetime.datetime(2024, 7, 26).strftime(written)
        assert render(tokenizer, [user(written)]) == f"\n{expected}|"


class TestSeveralTemplates:
    TEMPLATES: ClassVar = {"default": CHATML, "tool_use": "{{ tools[0].function.name }}" + CHATML, "rag": "x"}
    TOOLS: ClassVar = [{"type": "function", "function": {"name": "search"}}]

    def test_the_one_for_tools_is_used_with_tools_alone(self, with_template):
        tokenizer = with_template(self.TEMPLATES)
        plain = render(with_template(CHATML), [system("Add."), user("1")])
        assert render(tokenizer, [system("Add."), user("1")]) == plain
        assert render(tokenizer, [system("Add."), user("1")], tools=[]) == plain
        assert render(tokenizer, [system("Add."), user("1")], tools=self.TOOLS) == "search" + plain
        first, rest = encode_conversation(tokenizer, [system("Add."), user("1")], tools=self.TOOLS)
        assert tokenizer.decode(first + rest) == "search" + plain

    def test_it_is_the_one_that_servers_choose(self, with_template):
        tokenizer = with_template(self.TEMPLATES)
        for tools in (None, self.TOOLS):
            assert template_for(tokenizer, with_tools=bool(tools)) == tokenizer.get_chat_template(tools=tools)

    def test_none_to_choose_is_an_error(self, with_template):
        with pytest.raises(ValueError, match=r"chat_template=\['rag', 'tool_use'\]: none .* named 'default'"):
            render(with_template({"rag": CHATML, "tool_use": CHATML}), [user("1")])


class TestEdges:
    def test_nothing_after_the_cut_still_leaves_a_token(self, with_template):
        template = "{% for m in messages %}A<|im_start|>{{ m.content }}{% endfor %}"
        first, rest = encode_conversation(with_template(template), [user("")])
        assert (len(first), len(rest)) == (1, 1)

    def test_refusals(self, with_template):
        with pytest.raises(ValueError, match="does not write the text"):
            encode_conversation(with_template(IGNORES_USER), [user("1")])
        with pytest.raises(ValueError, match="has 1 tokens"):
            encode_conversation(with_template("{{ messages[0].content }}"), [user("1")])


class TestCutMiddle:
    def test_by_hand(self):
        assert cut_middle(range(10), 10, [99]) == list(range(10))
        assert cut_middle(range(10), 6, [99]) == [0, 1, 2, 99, 8, 9]
        assert cut_middle(range(10), 3, [98, 99]) == [0, 98, 99]
        assert cut_middle(range(10), 1, []) == [0]
        with pytest.raises(ValueError, match="limit=2: no room besides a mark of 2"):
            cut_middle(range(10), 2, [98, 99])

    @given(st.lists(st.integers(0, 9)), st.integers(3, 40))
    def test_head_and_tail_are_kept(self, tokens, limit):
        cut = cut_middle(tokens, limit, [-1, -2])
        assert len(cut) == min(limit, len(tokens))
        if len(tokens) > limit:
            at = cut.index(-1)
            assert cut[at : at + 2] == [-1, -2]
            assert cut[:at] == tokens[:at]
            assert cut[at + 2 :] == tokens[len(tokens) - (limit - at - 2) :]
            assert 0 <= at - (limit - at - 2) <= 1
