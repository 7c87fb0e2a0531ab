"""The model reflects on device: replies in order, each a draw of its own, long conversations cut."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import jsonschema
import pytest

from espl_jax.evolution.edit_replies import parse_edits
from espl_jax.evolution.schemas import OPERATIONS, blocks_schema, edits_schema
from espl_jax.models import transformer
from espl_jax.reflectors import local
from espl_jax.reflectors.local import CUT_MARK, local_reflector
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.text.chat import encode, encode_conversation, render
from tests.support import flat
from tests.support.fakes import TEMPLATE, model, tokenizer

NEW_TOKENS = 8
logits = jax.jit(transformer.logits, static_argnames="decoder")
SYSTEM = {"role": "system", "content": "Say what happened."}


def asked(text, opening=None):
    messages = [SYSTEM, {"role": "user", "content": text}]
    return messages + ([{"role": "assistant", "content": opening}] if opening else [])


def reflector(key=0, **settings):
    settings = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0} | settings
    sampling, capacity = flat.take(Sampling, settings), flat.take(Capacity, settings)
    return local_reflector(model(), key=jax.random.key(key), sampling=sampling, capacity=capacity, **settings)


def test_replies_do_not_depend_on_the_batch_or_its_order():
    conversations = [asked(text) for text in ("one", "two and more", "three", "four!", "five")]
    conversations[3] = [{"role": "system", "content": "Another task."}, *conversations[3][1:]]
    together = reflector()(conversations)
    assert len(set(together)) == 5
    assert reflector()(conversations[::-1]) == together[::-1]
    assert reflector()(conversations[3:4]) == together[3:4]
    assert reflector()([conversations[4], conversations[0]]) == [together[4], together[0]]
    assert reflector(key=1)(conversations) != together


def test_the_same_conversation_twice_gets_two_replies():
    first, other, second = reflector()([asked("one"), asked("two"), asked("one")])
    assert first != second
    assert reflector()([asked("two"), asked("one")]) == [other, first]


def test_the_same_conversation_in_a_later_call_gets_another_reply():
    reflect = reflector()
    calls = [*reflect([asked("one"), asked("two")]), *reflect([asked("one")]), *reflect([asked("one")])]
    first, other, second, third = calls
    assert len({first, second, third}) == 3
    assert reflector()([asked("one"), asked("one"), asked("two"), asked("one")]) == [
        first,
        second,
        other,
        third,
    ]


def test_the_opening_begins_the_reply_and_the_model_continues_it():
    reply, again = reflector(temperature=0)([asked("one", "Summary: it"), asked("one")])
    assert reply.startswith("Summary: it") and not again.startswith("Summary: it")
    # Greedy, the continuation is what the model says after the opening written out.
    whole = encode(tokenizer(), render(tokenizer(), asked("one", "Summary: it")))
    tokens = list(whole)
    for _ in range(NEW_TOKENS):
        tokens.append(int(next_logits(tokens).argmax()))
        if tokens[-1] == tokenizer().eos_token_id:
            break
    expected = "Summary: it" + tokenizer().decode(tokens[len(whole) :], skip_special_tokens=True)
    assert reply == expected


def next_logits(tokens):
    padded = tokens + [0] * (128 - len(tokens))
    return logits(model().params, model().config, jnp.array([padded]))[0, len(tokens) - 1]


@pytest.fixture
def sampled(monkeypatch):
    """The token lists that reach the sampler, and nothing drawn."""
    seen = []

    def sample_tree(params, config, systems, rests, keys, sampling, *_, **__):
        drawing = [bool(n) for n in sampling.max_new_tokens[0, :, 0]]
        seen.extend((systems[0], rest) for rest, draws in zip(rests[0], drawing, strict=True) if draws)
        return dataclasses.make_dataclass("Samples", ["tokens", "lengths"])(
            jnp.zeros((1, len(rests[0]), 1, 1), int), jnp.zeros((1, len(rests[0]), 1), int)
        )

    monkeypatch.setattr(local, "sample_tree", sample_tree)
    return seen


def test_a_long_conversation_loses_its_middle(sampled):
    short, long = asked("x" * 20), asked("begin " + "y" * 300 + " end")
    reflector(max_input_tokens=150)([short, long])
    system, rest = encode_conversation(tokenizer(), short)
    assert sampled[0] == (tuple(system), rest)
    cut_system, cut = sampled[1]
    assert cut_system == tuple(system) and len(cut_system) + len(cut) == 150
    text = tokenizer().decode(cut)
    head, _, tail = text.partition(CUT_MARK)
    whole = tokenizer().decode(encode_conversation(tokenizer(), long)[1])
    assert head and tail and whole.startswith(head) and whole.endswith(tail)
    assert "begin" in head and " end<|im_end|>\n<|im_start|>assistant\n" in tail


def test_the_context_bounds_what_the_reply_leaves(sampled):
    positions = model().config.max_positions
    reflector(max_new_tokens=96, max_input_tokens=10**6)([asked("z" * 2 * positions)])
    system, rest = sampled[0]
    assert len(system) + len(rest) == positions - 96


def test_instructions_alone_may_not_fill_the_limit(sampled):
    with pytest.raises(ValueError, match=r"reflection.max_input_tokens=40 .* \d+ tokens of the instructions"):
        reflector(max_input_tokens=40)([asked("short")])
    assert sampled == []


def test_thinking_is_withheld(sampled):
    (reply,) = reflector()([asked("one", "<think>I wonder</think>So")])
    assert reply == "So"


def test_no_conversations_no_replies(sampled):
    assert reflector()([]) == []


LIMITS = {"max_reply_tokens": 120, "max_edits": 2, "max_chars": 100}
SCHEMAS = [
    edits_schema(OPERATIONS, ("G0", "G1", "C0"), **LIMITS),
    edits_schema(("add", "modify"), ("G0",), min_edits=1, **LIMITS),
    blocks_schema(["Add.", "Subtract."], min_edits=1, **LIMITS),
]


class TestConstrained:
    """Random weights write what the schema says, and random text where it says nothing."""

    CONVERSATIONS = [asked(f"task {i}") for i in range(8)]  # noqa: RUF012
    SCHEMAS = [SCHEMAS[i % 3] for i in range(8)]  # noqa: RUF012

    @pytest.fixture(scope="class")
    def together(self):
        return reflector(max_new_tokens=120).constrained(self.CONVERSATIONS, self.SCHEMAS)

    @pytest.mark.parametrize("temperature", [0.7, 1.0])
    def test_every_reply_parses_and_validates(self, together, temperature):
        replies = together
        if temperature != 1:
            settings = {"max_new_tokens": 120, "temperature": temperature}
            replies = reflector(**settings).constrained(self.CONVERSATIONS, self.SCHEMAS)
        for reply, schema in zip(replies, self.SCHEMAS, strict=True):
            value = json.loads(reply)
            jsonschema.validate(value, schema)
            edits, drops = parse_edits(reply)
            assert not drops and len(edits) == len(value["edits"])

    def test_replies_do_not_depend_on_the_batch(self, together):
        assert len(set(together)) > 6
        few = reflector(max_new_tokens=120, max_rows=2)
        assert few.constrained(self.CONVERSATIONS[::-1], self.SCHEMAS[::-1]) == together[::-1]
        (alone,) = reflector(max_new_tokens=120).constrained(self.CONVERSATIONS[4:5], self.SCHEMAS[4:5])
        assert alone == together[4]

    def test_a_retry_gets_another_reply(self, together):
        again = reflector(max_new_tokens=120)
        ask = self.CONVERSATIONS[1:2], self.SCHEMAS[1:2]
        first, second = *again.constrained(*ask), *again.constrained(*ask)
        assert first == together[1] != second

    def test_there_is_no_opening(self):
        with pytest.raises(ValueError, match="a conversation ends with an opening"):
            reflector().constrained([asked("one", "Summary: it")], SCHEMAS[:1])

    def test_a_thinking_block_of_the_template_is_closed(self, sampled):
        thinking = copy.deepcopy(tokenizer())
        thinking.chat_template = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
        reflect = local_reflector(
            dataclasses.replace(model(), loaded_tokenizer=thinking),
            key=jax.random.key(0),
            sampling=Sampling(max_new_tokens=120),
        )
        reflect.constrained([asked("one")], SCHEMAS[:1])
        reflect([asked("one")])
        ends = [tokenizer().decode(rest)[-30:] for _, rest in sampled]
        assert ends[0].endswith("assistant\n<think>\n\n</think>\n\n") and ends[1].endswith(
            "assistant\n<think>\n"
        )
        assert sampled[0][0] == sampled[1][0]

    def test_no_conversations_no_replies(self, sampled):
        assert reflector().constrained([], []) == [] == sampled
