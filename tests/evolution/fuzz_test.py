"""Hostile replies: none raises or hangs, and whatever is dropped has a reason."""

import json
import random
import re
import time

import pytest

from espl_jax.evolution.edit_replies import parse_edits
from espl_jax.evolution.edits import REASONS, apply_edits, edit_to_json, replay_edits
from espl_jax.types import SystemPrompt
from tests.evolution.edits_test import REPAIRED

PROMPT = SystemPrompt(text="Be brief. A b.", principles=("x", "y"))

REAL = [
    *(text for text, _ in REPAIRED.values()),
    # As models wrote them.
    """Here are the edits:

```json
[{"op": "add", "principle": "When the task asks for a sum, add the numbers in order and check the result."},
{"op": "modify", "id": "G0", "principle": "Read the task."}]
```

These edits help because the attempts [1] and {2} were wrong.""",
    """<think>
The list has G0, G1. Maybe {"op": "remove", "id": "G1"}?
</think>
{"edits": [{"op": "merge", "ids": ["G0", "G1"], "principle": "A \\frac{1}{2}, \\\\times.", "why": "B"}]}""",
    '{"edits": [{"search": "Be brief.", "replace": "Think\\nfirst."}, {"search": "", "replace": "End."}]}',
    '1. **Add**: "Check the sum."\n2. {"op": "add", "principle": "Check the sum.", "evidence": null}',
]
PIECES = [
    *"[]{}\"'`,:\\/#-“”é😀 \n\x00\ud800",
    *("//", "/*", "```", "```json\n", "...", "<|im_end|>", "\\u", "\\ud8", "\\frac{", "<<<<<<< SEARCH\n"),
    *("=======\n", ">>>>>>> REPLACE\n", "op", "principle", "search", "G1", "C" + "9" * 30, "null", "true"),
    *("NaN", "1e999", "-" + "7" * 400, "0.1e-400", "{}", "[]", "[[]]", '{"a": {"b": [1, {"c": null}]}}'),
    *(
        '[{"op": "add", "principle": "',
        '"}',
        '"ids": ["G0"',
        '{"op":',
        '{"edits": [',
        '{"a":',
        '{"search": "',
    ),
]
VALUES = [
    None,
    True,
    0,
    -1,
    1e308,
    10**40,
    "",
    "x",
    "\ud800",
    [],
    {},
    [[1]],
    {"a": []},
    ["G0", 3, None],
    "G0, G1",
]
NAMES = ["op", "id", "ids", "principle", "evidence", "search", "replace", "text", "edits", "type", "", "a"]


def mutated(rng):
    """A real reply with pieces put in, cut out, doubled and exchanged."""
    text = rng.choice(REAL)
    for _ in range(rng.randrange(1, 6)):
        at, to = sorted(rng.choices(range(len(text) + 1), k=2))
        piece = rng.choice([*PIECES, rng.choice(REAL)[: rng.randrange(80)]])
        skipped = rng.choice([at, at, at + 1, min(to, at + 9), at - 40])
        text = text[:at] + rng.choice(["", piece]) + text[max(skipped, 0) :]
    return text


def other_types(rng):
    """Valid JSON of edits whose fields are anything."""

    def value(depth):
        kind = rng.randrange(4 if depth else 2)
        if kind == 0:
            return rng.choice(VALUES)
        if kind == 1:
            return rng.choice(
                ["add", "modify", "merge", "remove", "replace", "G0", "C1", "A rule b", "Be brief."]
            )
        if kind == 2:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        return {rng.choice(NAMES): value(depth - 1) for _ in range(rng.randrange(6))}

    return json.dumps(value(4), indent=rng.choice([None, 1]))


def deep(rng):
    """Brackets inside brackets, with a reply somewhere among them."""
    unit = rng.choice(["[", "{", '{"a":', '[{"op":', '{"edits":[', '{"op":"add","principle":['])
    return (
        unit * rng.choices([3, 30, 300], [6, 3, 1])[0]
        + rng.choice(["", *REAL])
        + rng.choice(["]", "}", "}]"]) * rng.randrange(40)
    )


def noise(rng):
    """Random bytes, or random pieces."""
    if rng.random() < 0.5:
        return rng.randbytes(rng.randrange(200)).decode("utf-8", rng.choice(["replace", "surrogateescape"]))
    return "".join(rng.choices(PIECES, k=rng.randrange(30)))


@pytest.mark.parametrize("replies", [15_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_reply_raises_or_hangs_and_every_drop_has_a_reason(replies):
    rng = random.Random(0)
    makers = rng.choices([mutated, other_types, deep, noise], [6, 2, 1, 1], k=replies)
    start, slowest, reasons = time.perf_counter(), 0.0, {}
    some = 0
    for make in makers:
        text = make(rng)
        before = time.perf_counter()
        edits, drops = parse_edits(text)
        slowest = max(slowest, time.perf_counter() - before)
        for reason, what in drops:
            reasons[reason] = reasons.get(reason, 0) + 1
            assert len(what) <= 200
        # What is not read as an edit is either a deliberate nothing or has been dropped for a reason.
        assert edits or drops or re.search(r"\[\s*\]", text), text
        record = [edit_to_json(edit) for edit in edits]
        json.dumps(record, ensure_ascii=False).encode("utf-8")
        assert replay_edits(PROMPT, record) == apply_edits(PROMPT, edits)
        some += bool(edits)
    seconds = time.perf_counter() - start
    print(
        f"{replies:,} replies in {seconds:.0f} s, the slowest in {1000 * slowest:.0f} ms; {some:,} with edits"
    )
    print(", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items())))
    assert set(reasons) <= set(REASONS)
    assert 0.2 < some / replies < 0.9 and len(reasons) >= 5
    assert slowest < 5
