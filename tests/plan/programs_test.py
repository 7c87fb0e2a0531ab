"""What a run compiles is known beforehand: the list that plan and a dry run have."""

import itertools

import pytest
from rich.console import Console

from espl_jax import train as loop
from espl_jax.plan import programs
from espl_jax.run import reflection, tasks
from espl_jax.run.workloads import Lengths, workloads
from espl_jax.training.optimizer import make_optimizer
from tests.support import fakes, listed_programs

CONFIG = fakes.CONFIG.replace(max_positions=4096)


def listed(memory=2**34, turns=False, **changes):
    """The programs of a run on a device of so many bytes: (phase, name, arguments of the function)."""
    c = fakes.config(**changes)
    lengths = Lengths(60, 100, c.sampling.max_new_tokens)
    evaluated = {"validation": 2, "test": 2}
    every = workloads(
        c, CONFIG, lengths, longest_problem=100, turns=turns, evaluated=evaluated, instructions=300
    )
    stages = {sampling: sampling.sizes(CONFIG, 0, None, memory) for sampling in every}
    optimizer = make_optimizer(1e-3)
    held = programs.held(c, CONFIG, optimizer, None)
    return stages, list(programs.run_programs(c, CONFIG, held, optimizer, stages, None, every_bucket=False))


def functions(found, phase):
    return {program.function for program in found if program.phase == phase}


SAMPLED = {"prefill", "decode_chunk", "admit", "move"}


def test_every_phase_has_its_programs():
    _, found = listed(loss__minibatches=2, loss__kind="ppo")
    assert functions(found, "rollouts") == functions(found, "reflection") == SAMPLED
    assert functions(found, "evaluation") <= SAMPLED
    assert functions(found, "update") == {"policy_gradient_step", "batch_logprobs"}
    assert len({program.call.signature for program in found}) == len(found)
    # What the time of an iteration is reckoned from.
    assert {program.phase for program in found if program.runs} == {"rollouts", "update"}


def test_reflection_is_listed_at_its_longest():
    """Conversations fill what the context of 4,096 leaves beside a reply of 100 tokens, and 300 instructions;
    all rollouts may be one prompt's; edits are constrained, step by step."""
    stages, found = listed(reflection__max_new_tokens=100, num_prompts=2, batch_size=3, group_size=5)
    summaries, edits = (sampling for sampling in stages if sampling.phase == "reflection")
    assert summaries.lengths == edits.lengths == Lengths(300, 4096 - 100 - 300, 100)
    assert summaries.longest_problem == 4096 and (summaries.problems, edits.problems) == (32, 4)
    assert edits.constrained and not summaries.constrained
    assert {sizes.steps for sizes in stages[edits]} == {1}
    named = {program.name: program for program in found if program.phase == "reflection"}
    assert named["summaries: prefill, a block of problems"].shape == "1 x 4096 tokens"
    for name in ("edits: constrained step, smallest", "summaries: admit", "edits: move"):
        assert named[name].lower().as_text()
    assert named["edits: constrained step, largest"].call.arguments[-2].shape == (
        4,
        -(-CONFIG.vocab_size // 32),
    )
    shorter, _ = listed(reflection__max_input_tokens=1000)
    assert next(s for s in shorter if s.name == "summaries").lengths.problem == 1000 - 300


@pytest.mark.parametrize(
    "changes", [{"reflection__max_new_tokens": 4096 - 300}, {"reflection__max_input_tokens": 300}]
)
def test_reflection_without_room_for_its_instructions_is_refused_at_the_start(changes):
    with pytest.raises(ValueError, match="leaves 300 for a conversation whose instructions alone have 300"):
        listed(**changes)
    listed(mode="rl", **changes)


@pytest.mark.parametrize(
    ("changes", "phases"),
    [
        ({"mode": "rl"}, {"rollouts", "update", "evaluation"}),
        ({"mode": "evolution"}, {"rollouts", "reflection", "evaluation"}),
        ({"reflection__reflector": "replay"}, {"rollouts", "update", "evaluation"}),
    ],
)
def test_phases_that_a_run_does_not_have(changes, phases):
    _, found = listed(evaluation__temperature=0.0, **changes)
    assert {program.phase for program in found} == phases


def test_turns_and_stages_are_extended():
    """With turns in every stage; else in the later ones, where rows are prefilled again."""
    (stages, found), (in_turns, answered) = (listed(turns=turns) for turns in (False, True))
    rollouts, spoken = next(iter(stages.values())), next(iter(in_turns.values()))
    assert len(rollouts) == len(spoken) == 1 and spoken[0].capacity > rollouts[0].capacity
    assert "extend" not in functions(found, "rollouts") and "extend" in functions(answered, "rollouts")
    stages, found = listed(memory=2**24, sampling__max_new_tokens=2000, group_size=50)
    assert len(next(iter(stages.values()))) == 3
    named = [program.name for program in found if program.phase == "rollouts"]
    for stage, name in itertools.product((1, 2, 3), ("admit", "move", "extend")):
        there = any(each.startswith(f"{name} of stage {stage}") for each in named)
        assert there == {"admit": stage == 1, "move": True, "extend": stage > 1}[name], (stage, name)


@pytest.mark.slow
def test_a_run_of_conversations_compiles_nothing_else(tmp_path, monkeypatch, caplog):
    """See train_test for the other phases."""
    fakes.take_over(monkeypatch)
    monkeypatch.setattr(tasks, "Arithmetic", fakes.Talker)
    monkeypatch.setattr(reflection, "local_reflector", lambda model, **settings: fakes.scripted_replies)
    config = fakes.config(
        mode="evolution",
        num_iterations=1,
        batch_size=1,
        group_size=2,
        data__test="",
        evaluation__every=0,
        sampling__max_new_tokens=64,
        sampling__stop_strings=tuple("abcdefghijklmnopqrstuvwxyz"),
    )
    with listed_programs.nothing_else(config, monkeypatch, caplog) as seen:
        loop.train(config, tmp_path, Console(quiet=True))
    assert seen >= {"prefill", "admit", "extend", "decode_chunk"}
