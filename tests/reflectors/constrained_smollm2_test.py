"""SmolLM2 writes critiques and revisions under their grammars: every reply that ends is read whole."""

import json

import jax
import jsonschema
import pytest

from espl_jax.evolution import formats
from espl_jax.evolution.templates import BUILT_IN
from espl_jax.pretrained.load import load_pretrained
from espl_jax.reflectors.local import LocalReflector
from espl_jax.sampling.settings import Sampling
from espl_jax.types import Question

TOKENS = 160
RULES = [
    "Read the task and answer exactly what it asks.",
    "Add the ones first, then the tens.",
    "Check the result by taking the first number away from it.",
    "Give the number alone.",
    "Write down every step.",
]


@pytest.fixture(scope="module")
def model():
    return load_pretrained("smollm2", dtype="auto", param_dtype="auto", matmul_precision="auto")


def shown(rules, letter="G"):
    return "\n".join(f"{letter}{i}. {rule}" for i, rule in enumerate(rules)) or "(none)"


def ids(rules, letter="G"):
    return [f"{letter}{i}" for i in range(len(rules))]


def question(stage, form, reasoning, operations, names, min_edits=0, **values):
    """A stage's question as reflection asks it."""
    template = BUILT_IN.load(stage)
    values["format"] = formats.instructions(form, operations, names, nothing=not min_edits)
    return Question(
        conversation=template.conversation(reason=reasoning == "brief", **values),
        grammar=formats.grammar(form, operations, names, max_edits=2, min_edits=min_edits),
        reasoning=reasoning,
        request=template.filled_request(**values) if reasoning == "brief" else "",
    )


def critique(i, form, reasoning):
    """The question about problem i; the principles differ from problem to problem."""
    rules = RULES[: i % 4]
    a, b = 17 + 3 * i, 58 + i * i % 41
    attempts = [
        f"- right: The attempt added {a % 10} and {b % 10} first and carried what was over.",
        f"- wrong: The attempt said {a + b - 10} because it forgot the carry.",
    ]
    values = {
        "problem": f"{a}+{b}=",
        "answer": a + b,
        "attempts": "\n".join(attempts[:: 1 if i % 2 else -1]),
        "principles": shown(rules),
        "rejected": "",
        "max_edits": 2,
        "max_words": 32,
    }
    return question("critique", form, reasoning, ("add", "modify"), ids(rules), min_edits=1, **values)


def revision(i, form, reasoning):
    """The question about some principles and candidates."""
    rules, candidates = RULES[: i % 3], RULES[i % 3 : i % 3 + 1 + i % 2]
    values = {
        "principles": shown(rules),
        "candidates": shown(candidates, "C"),
        "suggestions": "- G0: Read the task twice." if rules else "(none)",
        "max_words": 24 + i % 7,
    }
    names = ids(rules) + ids(candidates, "C")
    return question("revision", form, reasoning, ("modify", "merge"), names, **values)


def is_read_whole(form, reply, grammar):
    """Whether each edit of a reply is read; a merge that names one id twice may be dropped."""
    edits, drops = formats.read(form, reply.text)
    if form == "json":
        value = json.loads(reply.text)
        jsonschema.validate(value, grammar)
        return not drops and len(edits) == len(value["edits"])
    lines = [] if reply.text == "NONE" else reply.text.split("\n")
    return {reason for reason, _ in drops} <= {"wrong_ids"} and len(edits) + len(drops) == len(lines)


@pytest.mark.slow  # tests/train_test.py reflects under grammars with the tiny model
@pytest.mark.parametrize(
    ("form", "reasoning", "critiques", "revisions", "temperature"),
    [
        ("lines", "none", 7, 1, 1.0),
        ("lines", "brief", 30, 20, 0.7),
        ("json", "none", 30, 20, 0.7),
        ("json", "brief", 30, 20, 1.0),
    ],
)
def test_replies_that_end_are_read_whole(
    model, form, reasoning, critiques, revisions, temperature, record_property
):
    sampling = Sampling(max_new_tokens=TOKENS, temperature=temperature)
    reflect = LocalReflector(model=model, key=jax.random.key(0), sampling=sampling, reasoning_tokens=192)
    questions = [critique(i, form, reasoning) for i in range(critiques)]
    questions += [revision(i, form, reasoning) for i in range(revisions)]
    replies = reflect.ask(questions)
    ended = [pair for pair in zip(replies, questions, strict=True) if pair[0].ended]
    good = sum(is_read_whole(form, reply, asked.grammar) for reply, asked in ended)
    proposed = {edit for reply, _ in ended for edit in formats.read(form, reply.text)[0]}
    tokens = [len(model.tokenizer.encode(reply.text)) for reply in replies]
    said = f"{form}, {reasoning} reasoning, T={temperature}: {len(ended)} of {len(replies)} replies ended, "
    said += f"{good} of them read whole, {len(proposed)} edits, {sum(tokens)} tokens"
    print(said, *replies[:2], *replies[-2:], sep="\n")
    record_property("constrained replies", said)
    assert good == len(ended) and proposed
    assert all(bool(reply.reasoning) == (reasoning == "brief") for reply in replies)
