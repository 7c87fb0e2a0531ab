"""Crossover with a scripted reflector: when it is called, what it shows, and what becomes of its edits."""

import json

import numpy as np
import pytest

from espl_jax.evolution.crossover import problems_won
from espl_jax.evolution.edits import replay_edits
from espl_jax.evolution.guards import Guards
from espl_jax.types import Problem, Rollouts, SystemPrompt
from tests.support.evolving import crossover

A = SystemPrompt(text="Add.", principles=("Add the ones.", "Be brief."), id="p1", mu=30.0, sigma=2.0)
B = SystemPrompt(text="Add.", principles=("Carry the ten.",), id="p2", mu=20.0, sigma=4.0)
LOSER = SystemPrompt(text="Lose.", principles=("Guess.",), id="p3")


def rollouts_of(prompts, scores):
    """One rollout for each prompt and problem, with the rewards given, [M, B]."""
    rewards = np.array(scores, np.float32)[:, :, None]
    m, b, n = rewards.shape
    empty = np.zeros((m, b, n, 0))
    return Rollouts(
        prompts=tuple(prompts),
        problems=tuple(Problem(f"q{j}", f"Statement number {j}", "gold") for j in range(b)),
        system_tokens=(),
        problem_tokens=(),
        tokens=empty,
        lengths=np.zeros((m, b, n)),
        drawn=empty,
        logprobs=empty,
        untruncated_logprobs=empty,
        cutoffs=empty,
        temperature=1.0,
        truncated=np.zeros((m, b, n), bool),
        replies=(),
        answers=(),
        rewards=rewards,
        success=rewards > 0.5,
    )


def scripted(*edits):
    """A reflector with one reply, and the list of its calls."""
    calls = []

    def reflect(conversations):
        calls.append(list(conversations))
        return [json.dumps(list(edits))]

    return reflect, calls


ADD = {"op": "add", "principle": "Carry the ten over.", "evidence": "Set B won Statement number 2"}
WINS = [[1, 1, 0, 0.5], [0, 0, 1, 0.5]]


def test_problems_won_by_hand():
    scores = np.array([[0.9, 0.50, 0.2, 0.0], [0.1, 0.50, 0.2, 0.6], [0.2, 0.505, 0.9, 0.6]])
    assert problems_won(scores) == [[0], [], [2]]  # ties and wins within 0.01 count for nobody
    assert problems_won(np.array([[1.0, 0.0]])) == [[]]
    assert problems_won(np.array([[0.61], [0.60]])) == [[], []]


def test_edits_of_the_best_prompt():
    reflect, calls = scripted(
        ADD,
        {"op": "modify", "id": "G0", "principle": "Add the ones first."},
        {"op": "remove", "id": "G1", "evidence": "no win"},
    )
    offspring = crossover([B, A], rollouts_of([B, A], WINS[::-1]), reflect)
    child = offspring.child
    assert child.principles == ("Add the ones first.", "Carry the ten over.")
    assert (child.text, child.operator, child.parents) == ("Add.", "crossover", ("p1", "p2"))
    assert child.mu == pytest.approx(28.0)  # weights 1/4 and 1/16
    assert child.sigma == pytest.approx(4.2**0.5)
    assert child.edits[0] == ADD
    assert child.evidence == {
        "won": {"p1": ["q0", "q1"], "p2": ["q2"]},
        "problems": ["q0", "q1", "q2", "q3"],
        "scores": {"p2": [0.0, 0.0, 1.0, 0.5], "p1": [1.0, 1.0, 0.0, 0.5]},
    }
    assert [len(call) for call in calls] == [1]
    assert [record["stage"] for record in offspring.transcripts] == ["crossover"]


def test_only_winners_are_shown_and_only_set_a_has_ids():
    reflect, calls = scripted(ADD)
    prompts = [LOSER, B, A]
    offspring = crossover(prompts, rollouts_of(prompts, [[0, 0, 0, 0], *WINS[::-1]]), reflect)
    shown = calls[0][0][1]["content"]
    assert "G0. Add the ones.\nG1. Be brief." in shown
    assert "Set B\nInstructions: Add.\n- Carry the ten." in shown
    assert shown.index("Statement number 0") < shown.index("Set B") < shown.index("Statement number 2")
    assert "Statement number 3" not in shown
    assert "Guess." not in shown
    assert offspring.child.parents == ("p1", "p2")


@pytest.mark.parametrize(
    ("prompts", "scores", "reason"),
    [
        ([A], [[1, 0]], "one_prompt"),
        ([A, A], [[1, 0], [0, 1]], "one_prompt"),
        ([A, B], [[1, 1], [0, 1]], "no_wins"),  # no other prompt won any
        ([A, B], [[0.5, 0.5], [0.5, 0.5]], "no_wins"),
        ([A, B, LOSER], [[0.8, 0.8], [0.9, 0.0], [0.0, 0.9]], "no_wins"),  # the best won none
    ],
)
def test_no_call_without_wins(prompts, scores, reason):
    reflect, calls = scripted(ADD)
    rollouts = rollouts_of(prompts, scores)
    offspring = crossover(rollouts.distinct(), rollouts, reflect)
    assert (offspring.child, offspring.reason, calls) == (None, reason, [])


def test_copies_are_pooled():
    """By slots each copy would win a problem; pooled, p1 wins the first and p2 the second."""
    reflect, _ = scripted(ADD)
    rollouts = rollouts_of([A, B, A], [[1, 0], [0.4, 0.9], [1, 0]])
    offspring = crossover([A, B], rollouts, reflect)
    assert offspring.child.evidence["won"] == {"p2": ["q1"], "p1": ["q0"]}
    assert offspring.child.evidence["scores"]["p1"] == [1.0, 0.0]
    assert offspring.child.parents == ("p2", "p1")  # p2 has the higher mean, 0.65 against 0.5


def test_an_empty_set_can_only_grow():
    empty = SystemPrompt(text="Add.", id="p1")
    reflect, _ = scripted(
        {"op": "modify", "id": "G0", "principle": "From nowhere."}, {"op": "remove", "id": "G0"}, ADD
    )
    offspring = crossover([empty, B], rollouts_of([empty, B], WINS), reflect)
    assert offspring.child.principles == ("Carry the ten over.",)
    assert offspring.drops == {"unknown_id": 2}


@pytest.mark.parametrize(
    ("edits", "reason", "drops"),
    [
        ([], "no_edits", {}),
        ([{"op": "merge", "ids": ["G0", "G1"], "principle": "x"}], "no_edits", {"not_allowed": 1}),
        ([{"op": "add", "principle": "be brief"}], "no_edits", {"repeat": 1}),
    ],
)
def test_no_valid_edit_no_child(edits, reason, drops):
    reflect, _ = scripted(*edits)
    offspring = crossover([A, B], rollouts_of([A, B], WINS), reflect)
    assert (offspring.child, offspring.reason, offspring.drops) == (None, reason, drops)


def test_max_principles():
    reflect, _ = scripted(ADD)
    offspring = crossover([A, B], rollouts_of([A, B], WINS), reflect, guards=Guards(max_principles=2))
    assert (offspring.child, offspring.reason, offspring.drops) == (None, "unchanged", {"no_room": 1})


def test_prose_is_crossed_by_blocks():
    reflect, calls = scripted(
        {"search": "Be brief.", "replace": "Carry the ten.", "evidence": "Set B won Statement number 2"},
        {"search": "Add.", "replace": "Subtract."},
        {"op": "add", "principle": "Not offered here."},
    )
    best = SystemPrompt(text="Add the ones. Be brief.", id="p1")
    other = SystemPrompt(text="Carry.", id="p2")
    offspring = crossover([best, other], rollouts_of([best, other], WINS), reflect, form="prose")
    assert offspring.child.text == "Add the ones. Carry the ten."
    assert offspring.child.edits[0]["evidence"] == "Set B won Statement number 2"
    assert replay_edits(best, offspring.child.edits).text == offspring.child.text
    assert offspring.drops == {"not_found": 1, "not_allowed": 1}
    shown = calls[0][0][1]["content"]
    assert "Set A\nInstructions: Add the ones. Be brief.\nTasks won by set A:" in shown


def test_a_reflector_out_of_order_costs_the_crossover():
    offspring = crossover([A, B], rollouts_of([A, B], WINS), lambda conversations: [None])
    assert (offspring.child, offspring.reason, offspring.drops) == (None, "no_replies", {"no_reply": 1})
    assert offspring.transcripts[0]["reply"] is None


def test_parents_must_be_the_prompts_that_ran():
    with pytest.raises(ValueError, match=r"\['p2', 'p1'\].*\['p1', 'p2'\]"):
        crossover([B, A], rollouts_of([A, B], WINS), scripted(ADD)[0])
