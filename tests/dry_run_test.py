"""What a run would begin with, shown without training or writing anything."""

import io
import re

import jax
import numpy as np
import pytest
from rich.console import Console

from espl_jax import dry_run as dry
from espl_jax import train as loop
from espl_jax.data.order import Cursor, next_batch
from espl_jax.dry_run import dry_run
from espl_jax.rollouts.encode import conversation
from espl_jax.run import reflection
from espl_jax.run import roots as run_roots
from espl_jax.run import update as updates
from espl_jax.run.parts import assemble
from espl_jax.sampling import decode
from espl_jax.text.chat import encode_conversation, render
from tests.support import fakes


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    fakes.take_over(monkeypatch)


def shown(config):
    text = io.StringIO()
    dry_run(config, Console(file=text, width=300))
    return text.getvalue()


def test_shows_the_problem_the_answer_and_the_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = fakes.config()
    text = shown(config)
    parts = assemble(config)
    (problem, *_), _ = next_batch(parts.splits["train"], Cursor(config.seed), 2)
    prompt = run_roots.first_population(config).members[0]
    messages, _ = conversation(fakes.tokenizer(), prompt, problem, parts.environment, {})
    assert f"Problem {problem.id} under prompt p0" in text
    assert render(fakes.tokenizer(), messages) in text

    # Every token of the conversation is there, in its level.
    levels = encode_conversation(fakes.tokenizer(), messages)
    pieces = re.findall(r"^--- (.*?): (\d+) tokens.*\n(.*)$", text, re.MULTILINE)
    assert [name for name, _, _ in pieces] == ["system level", "problem level", "the model's turn"]
    for (_, count, listed), tokens in zip(pieces[:2], levels, strict=True):
        assert int(count) == len(tokens)
        assert listed == "  ".join(f"{t} {fakes.tokenizer().decode([t])!r}" for t in tokens)
    assert re.search(r"^Reply as graded: '", text, re.MULTILINE)
    answer = rf"^Answer read: '\d+', correct answer: '{problem.answer}', (right|wrong), reward"
    assert re.search(answer, text, re.MULTILINE)

    table = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    sizes = {name.strip(): [cell.strip() for cell in row] for name, *row in table}
    assert sizes["prefill, prompts"][0] == "2 x 64 tokens"
    assert sizes["prefill, a block of problems"][0] == "4 x 32 tokens"
    assert sizes["decode chunk, largest"][0] == "12 rows x 64 columns"
    assert sizes["policy-gradient step"][0] == "1 x 12 x 16 new tokens"
    assert all(re.fullmatch(r"\d+\.\d+ [MG]iB", size) for row in list(sizes.values())[1:] for size in row[1:])
    assert "Rollouts: 12 slots of 64 columns; chunks of 6 steps come in" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_shapes_are_those_that_the_run_compiles(monkeypatch, tmp_path):
    """Every decode chunk, and the step, of a real run is among the shapes announced."""
    config = fakes.config(num_iterations=1, sampling__max_new_tokens=40, evaluation__every=0, data__test="")
    text = shown(config)
    announced = (
        r"Rollouts: (\d+) slots of (\d+) columns; chunks of 32 steps .* widths, ([\d, ]+) rows, "
        r".* lengths, ([\d, ]+) columns"
    )
    slots, capacity, *listed = re.search(announced, text).groups()
    rows, columns = (set(map(int, numbers.split(", "))) for numbers in listed)
    chunk, step, seen = decode.decode_chunk, updates.policy_gradient_step, []

    def listen(params, config, system, held, batch, *args, columns, **kwargs):
        assert held[1].shape[2:4] == (int(slots), int(capacity))
        seen.append((len(batch.token), columns))
        return chunk(params, config, system, held, batch, *args, columns=columns, **kwargs)

    def listen_to_step(state, frozen, reference, batch, *args, **kwargs):
        seen.append(batch.inputs.shape)
        return step(state, frozen, reference, batch, *args, **kwargs)

    monkeypatch.setattr(decode, "decode_chunk", listen)
    monkeypatch.setattr(updates, "policy_gradient_step", listen_to_step)
    monkeypatch.setattr(reflection, "local_reflector", lambda model, **settings: fakes.scripted_replies)
    said = io.StringIO()
    loop.train(config, tmp_path, Console(file=said, width=1000))
    *chunks, batch = seen
    assert len(chunks) >= 2 and {n for n, _ in chunks} <= rows and {n for _, n in chunks} <= columns
    assert chunks[0][0] == max(rows)
    assert " x ".join(map(str, batch)) + " new tokens" in text
    # The run says the same, once.
    assert said.getvalue().count("Rollouts: ") == 1
    assert re.search(announced, said.getvalue()).group(0) in text


@pytest.mark.parametrize("strategy", ["uniform", "softmax"])
def test_shows_what_the_first_iteration_chooses(strategy, tmp_path, monkeypatch):
    """With more roots than an iteration has prompts: the same prompts, problems and random key."""
    roots = tmp_path / "roots.jsonl"
    roots.write_text("".join(f'{{"text": "Add, way {i}."}}\n' for i in range(9)))
    chosen = []

    def listen(model, prompts, problems, environment, *, key, **settings):
        chosen.append((prompts, problems, jax.random.key_data(key).tolist()))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "collect_rollouts", listen)
    monkeypatch.setattr(dry, "collect_rollouts", listen)
    for seed in (0, 1):
        changes = {"population__start_from": str(roots), "population__text": "", "mode": "evolution"}
        changes |= {"seed": seed, "selection__strategy": strategy}
        config = fakes.config(**changes)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path / f"run{seed}", Console(quiet=True))
        with pytest.raises(KeyboardInterrupt):
            shown(config)
        (prompts, problems, key), seen = chosen
        assert seen == (list(prompts[:1]), list(problems[:1]), key)
        chosen.clear()


def test_without_training_there_is_no_step():
    text = shown(fakes.config(mode="reflection"))
    assert "policy-gradient step" not in text and "Trained:" not in text
    # One prompt takes the places of both.
    assert re.search(r"\| +1 x 64 tokens", text) and re.search(r"\| +2 x 32 tokens", text)
    assert "12 rows x 64 columns" in text


def test_programs_with_each_layers_weights_alone():
    """What CPUs sample with: shapes are taken wherever arrays would be."""
    config = fakes.config(mode="rl", model__param_dtype="bfloat16", model__sampling_layout="unstacked")
    parts = assemble(config)
    prompts, problems = run_roots.first_population(config).members, parts.splits["train"].problems[:2]
    found = dry.programs_of(parts, prompts, problems, config, say=lambda text: None)
    assert [program.name for program in found][-1] == "policy-gradient step"


@pytest.mark.slow
def test_a_long_answer_is_cut(monkeypatch):
    monkeypatch.setattr(dry, "LONGEST_ANSWER", 4)
    text = shown(fakes.config(mode="evolution", sampling__max_new_tokens=6))
    assert re.search(r"the model's turn: [1-4] tokens", text)


def test_a_prompt_without_room_for_an_answer_is_refused():
    with pytest.raises(
        ValueError, match=r"the longest prompt has \d+ tokens, which leaves no room in a context of 20"
    ):
        shown(fakes.config(sampling__context_limit=20))


@pytest.mark.slow
def test_memory_grows_with_the_batch():
    def numbers(text):
        return [float(n) for n in re.findall(r"([\d.]+) MiB", text.split("| prefill", 1)[1])]

    few, many = (numbers(shown(fakes.config(mode="evolution", group_size=n))) for n in (3, 12))
    assert np.all(np.array(many[3:6]) >= np.array(few[3:6])) and many != few
