"""From a configuration to the parts of a run."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from espl_jax.environments.arithmetic import Arithmetic
from espl_jax.environments.math import Math
from espl_jax.evolution import population as populations
from espl_jax.models import lora
from espl_jax.rollouts.keys import stream_key
from espl_jax.run import parts as assembling
from espl_jax.run import weights
from espl_jax.run.parts import abstract_run_state, assemble
from espl_jax.run.roots import first_population
from espl_jax.run.state import first_train_state
from espl_jax.sampling.settings import Sampling
from espl_jax.sampling.truncation import Truncation
from espl_jax.text.chat_format import ChatFormat
from espl_jax.types import SystemPrompt
from tests.support import fakes
from tests.support import tiny as decoders


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(weights, "load_pretrained", fakes.load_pretrained)
    monkeypatch.setattr(assembling.sharding, "make_mesh", lambda sizes: None)


@pytest.mark.parametrize(
    ("mode", "trains", "evolves"),
    [("espl", True, True), ("rl", True, False), ("evolution", False, True), ("reflection", False, True)],
)
def test_what_each_mode_has(mode, trains, evolves):
    config = fakes.config(mode=mode)
    parts = assemble(config)
    assert (parts.trains, parts.evolves, parts.lora) == (trains, evolves, True)
    state = first_train_state(config, parts)
    assert (state is not None) == trains
    assert (parts.policy(state) is parts.reference) == (not trains)
    # Reflection alone is mutation alone.
    assert parts.evolution.crossover_prob == (0.0 if mode == "reflection" else 0.5)


def test_splits_share_no_problem():
    splits = assemble(fakes.config()).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 2, "test": 2}
    ids = [problem.id for split in splits.values() for problem in split.problems]
    assert len(set(ids)) == 10


def test_validation_is_held_out_of_train_where_there_is_none():
    config = fakes.config(data__validation="", data__validation_count=2, data__test="")
    splits = assemble(config).splits
    whole = assemble(fakes.config()).splits["train"]
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "validation": 2}
    held = {problem.id for split in splits.values() for problem in split.problems}
    assert held == {problem.id for problem in whole.problems}
    other = assemble(
        fakes.config(data__validation="", data__validation_count=2, data__test="", seed=3)
    ).splits
    assert other["validation"].problems != splits["validation"].problems


def test_files_with_fields_of_their_own(tmp_path):
    rows = [{"task": f"Say {i}.", "gold": str(i)} for i in range(4)]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"data__fields__text": "task", "data__fields__answer": "gold"}
    splits = {"data__train": str(file), "data__validation": "", "data__validation_count": 1, "data__test": ""}
    config = fakes.config(**names, **splits)
    problems = [p for split in assemble(config).splits.values() for p in split.problems]
    assert {(p.text, p.answer) for p in problems} == {(f"Say {i}.", str(i)) for i in range(4)}


def test_the_same_problem_in_two_splits_is_refused(tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": "2"}\n')
    config = fakes.config(data__train=str(file), data__validation=str(file), data__test="")
    with pytest.raises(ValueError, match=r"of validation .* has the same id as .* of train"):
        assemble(config)


def test_a_batch_larger_than_the_problems_is_refused_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(weights, "load_pretrained", None)
    with pytest.raises(ValueError, match=r"batch_size=7: data.train has only 6 problems"):
        assemble(fakes.config(batch_size=7))


def test_environments():
    boxed = {"environment__answer_format": "boxed", "environment__instruction": "Box it."}
    assert assemble(fakes.config(**boxed)).environment == Arithmetic("boxed", "Box it.")
    assert assemble(fakes.config(environment__name="math")).environment == Math("boxed", None)


def test_numerics_and_sampling_reach_their_places():
    config = fakes.config(
        model__dtype="bfloat16",
        model__scan_layers=False,
        model__chat_template_kwargs='{"thinking": false}',
        lora__scale=2.0,
        sampling__max_rows=7,
        sampling__top_p=0.9,
        sampling__stop_strings=("User:",),
        sampling__context_limit=200,
    )
    parts = assemble(config)
    decoder = parts.reference.config
    assert (decoder.dtype, decoder.scan_layers, decoder.lora_scale) == ("bfloat16", False, 2.0)
    # The weights, adapters, Adam's two averages of them, and their copy in bfloat16 for sampling.
    held = sum((3 * 4 + 2) * x.size for x in jax.tree.leaves(first_train_state(config, parts).trainable))
    held += sum(x.nbytes for x in jax.tree.leaves(parts.reference.params))
    assert held <= parts.capacity.held_bytes < held + 100
    assert (parts.capacity.max_rows, parts.capacity.mesh) == (7, None)
    assert parts.capacity.longest_problem > 5
    assert parts.sampling == Sampling(
        max_new_tokens=6, temperature=1.0, truncation=Truncation(top_p=0.9), context_limit=200
    )
    assert parts.chat == ChatFormat(template_arguments={"thinking": False}, stop_strings=("User:",))
    assert assemble(fakes.config()).capacity.max_rows is None


def test_fresh_adapters_change_nothing_and_share_the_base():
    config = fakes.config(lora__targets=("query", "up"))
    parts = assemble(config)
    state = first_train_state(config, parts)
    assert set(state.trainable["layers"]) == {"attention", "mlp"}
    assert set(state.trainable["layers"]["mlp"]) == {"up"}
    policy = parts.policy(state)
    up, base = policy.params["layers"]["mlp"]["up"], parts.reference.params["layers"]["mlp"]["up"]
    assert up["weight"] is base["weight"] and "lora_a" not in base
    assert not up["lora_b"].any() and up["lora_a"].shape[-1] == 2
    assert parts.frozen is parts.reference.params


def test_full_fine_tuning_trains_a_float32_copy():
    config = fakes.config(lora__rank=0, model__param_dtype="bfloat16")
    parts = assemble(config)
    state = first_train_state(config, parts)
    assert parts.frozen is None
    for trained, base in zip(
        jax.tree.leaves(state.trainable), jax.tree.leaves(parts.reference.params), strict=True
    ):
        assert (trained.dtype, base.dtype) == (np.float32, jax.numpy.bfloat16)
        assert np.array_equal(trained, base.astype(np.float32))
    # A copy also where nothing has to be converted: the step gives its state's memory away.
    parts = assemble(fakes.config(lora__rank=0))
    state = first_train_state(fakes.config(lora__rank=0), parts)
    pointers = [
        {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}
        for tree in (state.trainable, parts.reference.params)
    ]
    assert not pointers[0] & pointers[1]


@pytest.mark.parametrize("rank", [0, 2])
def test_the_abstract_state_is_that_of_the_run(rank):
    config = fakes.config(lora__rank=rank)
    parts = assemble(config)
    abstract = abstract_run_state(config, parts.reference.config, parts.optimizer, parts.mesh)
    real = first_train_state(config, parts)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for shape, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)


def test_adapters_depend_on_the_seed_alone():
    def adapter(seed):
        config = fakes.config(seed=seed)
        return first_train_state(config, assemble(config)).trainable["layers"]["mlp"]["up"]["lora_a"]

    assert np.array_equal(adapter(1), adapter(1)) and not np.array_equal(adapter(1), adapter(2))


def test_streams_of_random_numbers_differ():
    keys = [
        stream_key(seed, stream, iteration)
        for seed in (0, 1)
        for stream in ("train", "validation", "test", "reflection")
        for iteration in (1, 2)
    ]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)
    assert jax.random.key_data(stream_key(0, "train", 1)).tolist() == jax.random.key_data(keys[0]).tolist()


def test_the_first_population_is_the_root():
    population = first_population(fakes.config(population__text="Add.", population__principles=("Twice.",)))
    assert population == populations.start([SystemPrompt(text="Add.", principles=("Twice.",))], 100)


def test_a_saved_population_keeps_ids_and_ratings(tmp_path):
    saved = populations.start([SystemPrompt(text=f"{i}", mu=20.0 + i) for i in range(4)], 10)
    saved = saved.with_ratings({"p3": (31.5, 2.25)})
    file = tmp_path / "population.json"
    file.write_text(json.dumps(saved.to_json()))
    settings = {"population__start_from": str(file), "population__text": ""}
    assert first_population(fakes.config(**settings, population__max_size=10)) == saved
    # A smaller population keeps the newest, and still gives no id twice.
    small = first_population(fakes.config(**settings, population__max_size=2))
    assert [member.id for member in small.members] == ["p2", "p3"]
    assert (small.max_size, small.created) == (2, 4)
    added = small.add([SystemPrompt(text="new")], 1).population
    assert [member.id for member in added.members] == ["p3", "p4"]


def test_first_prompts_of_the_users_own(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"text": "Add."}\n\n{"principles": ["Twice."]}\n{"text": "Sum.", "principles": ["Once."]}\n'
    )
    population = first_population(fakes.config(population__start_from=str(file), population__text=""))
    assert [(member.id, member.render()) for member in population.members] == [
        ("p0", "Add."),
        ("p1", "G0. Twice."),
        ("p2", "Sum.\n\nG0. Once."),
    ]
    assert {member.mu for member in population.members} == {25.0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "Expecting"),
        ("a.json", "[]", "has list, expected"),
        ("a.json", '{"members": []}', r"has \['members'\], expected"),
        ("a.jsonl", '{"text": "a", "rules": []}', r"unknown fields \['rules'\]"),
        ("a.jsonl", '{"text": "a"}\n{"text": "a"}', "roots 0 and 1 are the same prompt"),
        ("a.jsonl", "", "needs at least one"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"principles": "abc"}',
            "line 3: text must be a string, and principles a list",
        ),
        ("a.jsonl", '{"text": null}', "line 1: text must be a string"),
        ("a.jsonl", '{"principles": null}', "line 1: text must be a string"),
        ("a.jsonl", '["text"]', "'list' object"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON .nested too deeply"),
        ("a.jsonl", '{"text": "a \\ud83c"}', "the prompt p0 has .* at character 3, half of a surrogate"),
    ],
)
def test_what_is_no_population_is_refused_by_name(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"population\.start_from='.*{name}': .*{message}.*; give"):
        first_population(fakes.config(population__start_from=str(tmp_path / name), population__text=""))


def test_prose_has_no_principles(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "principles": ["c"]}')
    settings = {"population__start_from": str(tmp_path / "a.jsonl"), "population__text": ""}
    with pytest.raises(ValueError, match=r"population\.start_from=.*only the text, but p1 have principles"):
        first_population(fakes.config(evolution__form="prose", **settings))


@pytest.mark.parametrize(
    ("limit", "new_tokens", "budget"),
    [(0, 96, 4096 - 96), (1000, 96, 1000 - 96), (1000, 990, 250), (0, 4096 - 300, 1024)],
)
def test_prompts_leave_room_in_the_context(limit, new_tokens, budget):
    parts = assemble(fakes.config(sampling__context_limit=limit, sampling__max_new_tokens=new_tokens))
    guards, longest = parts.evolution.guards, parts.capacity.longest_problem
    assert guards.max_prompt_tokens == (budget if budget in (250, 1024) else budget - longest)
    assert len(guards.tokenize("abc")) == 3 and guards.problems == parts.splits["train"].problems


@pytest.mark.parametrize(("mode", "rank"), [("espl", 4), ("rl", 0), ("evolution", 4)])
def test_a_model_that_comes_with_an_adapter(monkeypatch, mode, rank):
    """Its adapter is part of what is trained on, never lost to the run's own."""

    def load(source, dtype="float32", mesh=None, **numerics):
        model = fakes.load_pretrained(source, dtype, mesh, **numerics)
        params = lora.attach(model.params, decoders.adapters(model.config, rank=2, targets=("query", "up")))
        return dataclasses.replace(model, params=params, config=model.config.replace(lora_scale=0.25))

    monkeypatch.setattr(weights, "load_pretrained", load)
    c = fakes.config(mode=mode, lora__rank=rank)
    came = load("x", lora_scale=1.0)
    tokens = np.arange(12).reshape(1, -1)
    expected = decoders.logits(came.params, came.config, tokens)
    parts = assemble(c)
    policy = parts.policy(first_train_state(c, parts))
    np.testing.assert_allclose(decoders.logits(policy.params, policy.config, tokens), expected, atol=1e-4)
    _, own = lora.detach(parts.reference.params)
    assert bool(own) == (mode == "evolution")
    assert parts.reference.config.lora_scale == (0.25 if mode == "evolution" else c.lora.scale)
