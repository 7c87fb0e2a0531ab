"""The model reflects on device: replies in order, each a draw of its own, long conversations cut."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from espl_jax.models import transformer
from espl_jax.reflectors import local
from espl_jax.reflectors.local import CUT_MARK, local_reflector
from espl_jax.text.chat import encode, encode_conversation, render
from tests.fakes import model, tokenizer

NEW_TOKENS = 8
logits = jax.jit(transformer.logits, static_argnames="config")
SYSTEM = {"role": "system", "content": "Say what happened."}


def asked(text, opening=None):
    messages = [SYSTEM, {"role": "user", "content": text}]
    return messages + ([{"role": "assistant", "content": opening}] if opening else [])


def reflector(key=0, **settings):
    settings = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0} | settings
    return local_reflector(model(), key=jax.random.key(key), **settings)


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

    def sample_tree(params, config, systems, rests, keys, *, max_new_tokens, **settings):
        drawing = [bool(n) for n in max_new_tokens[0, :, 0]]
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
