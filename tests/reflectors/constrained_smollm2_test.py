"""SmolLM2 writes critiques and revisions under their schemas: every reply validates and parses."""

import json

import jax
import jsonschema
import pytest

from espl_jax.evolution.edit_replies import parse_edits
from espl_jax.evolution.schemas import edits_schema
from espl_jax.evolution.templates import load_template
from espl_jax.pretrained.load import load_pretrained
from espl_jax.reflectors.local import LocalReflector
from espl_jax.sampling.settings import Sampling

TOKENS = 160
LIMITS = {"max_reply_tokens": TOKENS, "max_edits": 2, "max_chars": 256}
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


def critique(i):
    """The conversation about problem i, and its schema; the principles differ from problem to problem."""
    rules = RULES[: i % 4]
    a, b = 17 + 3 * i, 58 + i * i % 41
    attempts = [
        f"- right: The attempt added {a % 10} and {b % 10} first and carried what was over.",
        f"- wrong: The attempt said {a + b - 10} because it forgot the carry.",
    ]
    conversation = load_template("critique").conversation(
        opening=False,
        problem=f"{a}+{b}=",
        answer=a + b,
        attempts="\n".join(attempts[:: 1 if i % 2 else -1]),
        principles=shown(rules),
        max_edits=2,
        max_words=32,
    )
    return conversation, edits_schema(("add", "modify"), ids(rules), min_edits=1, **LIMITS)


def revision(i):
    """One revision of some principles and candidates, and its schema."""
    rules, candidates = RULES[: i % 3], RULES[i % 3 : i % 3 + 1 + i % 2]
    conversation = load_template("revision").conversation(
        opening=False,
        principles=shown(rules),
        candidates=shown(candidates, "C"),
        suggestions="- G0: Read the task twice." if rules else "(none)",
        max_words=24 + i % 7,
    )
    return conversation, edits_schema(("modify", "merge"), ids(rules) + ids(candidates, "C"), **LIMITS)


@pytest.mark.slow  # tests/train_test.py reflects under schemas with the tiny model
@pytest.mark.parametrize(
    ("critiques", "revisions", "temperature"), [(7, 1, 1.0), (60, 40, 0.7), (60, 40, 1.0)]
)
def test_every_reply_parses_and_validates(model, critiques, revisions, temperature, record_property):
    sampling = Sampling(max_new_tokens=TOKENS, temperature=temperature)
    reflect = LocalReflector(model=model, key=jax.random.key(0), sampling=sampling)
    conversations, schemas = zip(
        *map(critique, range(critiques)), *map(revision, range(revisions)), strict=True
    )
    replies = reflect.constrained(conversations, schemas)
    good, proposed = 0, []
    for reply, schema in zip(replies, schemas, strict=True):
        value = json.loads(reply)
        jsonschema.validate(value, schema)
        edits, drops = parse_edits(reply)
        good += not drops and len(edits) == len(value["edits"])
        proposed += edits
    tokens = [len(model.tokenizer.encode(reply)) for reply in replies]
    said = f"T={temperature}: {good} of {len(replies)} replies, {len(proposed)} edits, {sum(tokens)} tokens"
    print(said, *replies[:2], *replies[-2:], sep="\n")
    record_property("constrained replies", said)
    assert good == len(replies)
    assert len({edit.principle for edit in proposed}) > len(replies) / 2
