"""Problems and prompts that the context cannot hold are known at the start."""

import contextlib
import copy
import json

import pytest

from espl_jax.pretrained.load import Pretrained
from espl_jax.rollouts.encode import conversation_lengths
from espl_jax.run import parts as assembling
from espl_jax.run import weights
from espl_jax.run.context import check_first_prompts
from espl_jax.run.parts import assemble
from espl_jax.run.roots import first_population
from espl_jax.train import left_out
from tests.support import fakes


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(weights, "load_pretrained", fakes.load_pretrained)
    monkeypatch.setattr(assembling.sharding, "make_mesh", lambda sizes: None)


def with_long_problems(folder, **changes):
    """Six problems a split, of which train has one of 200 letters and test has one of 160."""
    settings = {"environment__instruction": ""}
    for split, length in {"train": 200, "validation": 0, "test": 160}.items():
        texts = [f"{split} {i}?" for i in range(5)] + [split[0] * length or "What?"]
        rows = [{"problem": text, "answer": "1", "id": f"{split}{i}"} for i, text in enumerate(texts)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings[f"data__{split}"] = str(folder / f"{split}.jsonl")
    return fakes.config(**settings, **changes)


# Frames of the template: "<|im_start|>system\n", "<|im_end|>\n", "<|im_start|>user\n", "<|im_end|>\n",
# "<|im_start|>assistant\n", a token a byte and one for each mark.
FRAME = (1 + 7) + 2 + (1 + 5) + 2 + (1 + 10)


def test_lengths_are_those_of_the_conversations(tmp_path):
    config = with_long_problems(tmp_path)
    parts = assemble(config)
    problems = parts.splits["train"].problems
    lengths = conversation_lengths(fakes.tokenizer(), problems, parts.environment, {})
    assert lengths == {problem.id: FRAME + len(problem.text) for problem in problems}
    long = conversation_lengths(fakes.tokenizer(), problems, parts.environment, {}, least=200)
    assert long == {"train5": FRAME + 200}


@pytest.mark.parametrize(
    ("limit", "changes", "found"),
    [
        # A prompt of at most 10 tokens: it fits with one new token, or fails by one.
        (FRAME + 200 + 10 + 1, {"evolution__max_prompt_tokens": 10}, {}),
        (FRAME + 200 + 10, {"evolution__max_prompt_tokens": 10}, {"train": ("train5",)}),
        (
            FRAME + 160 + 10,
            {"evolution__max_prompt_tokens": 10},
            {"train": ("train5",), "test": ("test5",)},
        ),
        # In rl no prompt grows: the root has the 6 tokens of "Reply."
        (FRAME + 200 + 6 + 1, {"mode": "rl"}, {}),
        (FRAME + 200 + 6, {"mode": "rl"}, {"train": ("train5",)}),
        # A quarter of the context is the prompt's, whatever else is in it.
        (300, {}, {"train": ("train5",)}),
    ],
)
def test_they_are_refused_by_id_or_dropped_and_counted(limit, changes, found, tmp_path):
    config = with_long_problems(tmp_path, sampling__context_limit=limit, **changes)
    with config.unlocked():
        config.data.too_long = "drop"
    parts = assemble(config)
    assert parts.left_out == found
    for split, problem_set in parts.splits.items():
        kept = {problem.id for problem in problem_set.problems}
        assert kept == {f"{split}{i}" for i in range(6)} - {*found.get(split, ())}
    assert len(left_out(parts)) == len(found)
    assert (
        not found
        or "data.train: dropped 1 problems that are too long for the context (train5)" in left_out(parts)[0]
    )
    with config.unlocked():
        config.data.too_long = "refuse"
    if not found:
        assemble(config)
        return
    refusal = r"data\.train=.*: 1 of 6 problems are too long \(train5\): with a sys"
    with pytest.raises(ValueError, match=refusal):
        assemble(config)


def test_what_is_left_has_to_make_a_batch(tmp_path):
    settings = {"sampling__context_limit": 200, "data__too_long": "drop", "mode": "rl"}
    with pytest.raises(ValueError, match=r"batch_size=6: data\.train has only 5 problems"):
        assemble(with_long_problems(tmp_path, batch_size=6, **settings))
    refusal = r"data\.train=.*: 6 of 6 problems are too long \(train0, train1, .* context of 20;"
    with pytest.raises(ValueError, match=refusal):
        assemble(with_long_problems(tmp_path, **settings | {"sampling__context_limit": 20}))


def test_a_context_that_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"sampling\.context_limit=4097: the model supports 4096"):
        assemble(fakes.config(sampling__context_limit=4097))


def test_grown_prompts_leave_room_where_rollouts_are_short(tmp_path):
    """The frame of the system turn counts: six new tokens do not make up for it."""
    parts = assemble(with_long_problems(tmp_path, sampling__context_limit=1000))
    assert parts.evolution.guards.max_prompt_tokens == 1000 - (FRAME + 200) - 1


def test_first_prompts_of_the_users_own(tmp_path):
    (tmp_path / "roots.jsonl").write_text(json.dumps({"text": "x" * 100}))
    settings = {"population__start_from": str(tmp_path / "roots.jsonl"), "population__text": ""}
    limit = FRAME + 200 + 100
    for context, refused in ((limit, True), (limit + 1, False)):
        config = with_long_problems(tmp_path, mode="rl", sampling__context_limit=context, **settings)
        parts, population = assemble(config), first_population(config)
        expected = pytest.raises(ValueError, match=r"start_from=.*prompt p0 .* is 329; shorten the prompt")
        with expected if refused else contextlib.nullcontext():
            check_first_prompts(population, config, parts.splits, parts.reference, parts.environment)


@pytest.mark.parametrize("changes", [{"mode": "rl"}, {"evolution__max_prompt_tokens": 10}])
def test_a_blank_root_has_the_system_turn_of_the_template(changes, tmp_path, monkeypatch):
    default = "<|im_start|>system\nAnswer in one word.<|im_end|>\n"
    tokenizer = copy.deepcopy(fakes.tokenizer())
    tokenizer.chat_template = f"{{% if messages[0].role != 'system' %}}{default}{{% endif %}}{fakes.TEMPLATE}"

    def load(*args, **kwargs):
        loaded = fakes.load_pretrained(*args, **kwargs)
        return Pretrained(loaded.params, loaded.config, tokenizer)

    monkeypatch.setattr(weights, "load_pretrained", load)
    limit = FRAME + 200 + len("Answer in one word.")
    for context, refused in ((limit, True), (limit + 1, False)):
        settings = {"population__text": "", "sampling__context_limit": context, **changes}
        config = with_long_problems(tmp_path, **settings)
        expected = pytest.raises(
            ValueError, match=rf"long \(train5\): .* prompt has {limit} tokens, which leaves"
        )
        with expected if refused else contextlib.nullcontext():
            assemble(config)
        parts = assemble(with_long_problems(tmp_path, **{**settings, "sampling__context_limit": limit + 1}))
        expected = pytest.raises(
            ValueError, match=rf"system prompt p0 and the longest problem have {limit} tokens"
        )
        with expected if refused else contextlib.nullcontext():
            check_first_prompts(
                first_population(config), config, parts.splits, parts.reference, parts.environment
            )
