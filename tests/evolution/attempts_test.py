"""What is reflected on and how it is shown, by hand; and that feedback reaches the reflector."""

import dataclasses

import numpy as np
import pytest

from espl_jax.environments.arithmetic import Arithmetic
from espl_jax.environments.base import checked_grades
from espl_jax.environments.math import Math
from espl_jax.environments.search import Search
from espl_jax.evolution.attempts import Attempt, choose_attempts, problem_values
from espl_jax.evolution.evolve import worse_than_parent
from espl_jax.evolution.mutation import mutate
from espl_jax.evolution.population import start
from espl_jax.evolution.reflection import Rejected, shown_rejected
from espl_jax.evolution.settings import Evolution, Reflection
from espl_jax.types import Problem, Question, Reply, SystemPrompt
from examples.guess import Guess
from tests.evolution.mutation_test import OTHER, PARENT, rollouts_of, user_turn

REWARDS = [[[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0.25]]]


def chosen(seed=0, rewards=REWARDS, **settings):
    rollouts = rollouts_of([PARENT], rewards)
    return choose_attempts(rollouts, [0], Reflection(**settings), np.random.default_rng(seed))


class TestChoice:
    @pytest.mark.parametrize(
        ("problems", "numbers"),
        [("mixed", [0, 3]), ("failed", [2, 3]), ("mixed_or_failed", [0, 3]), ("all", [0, 1, 2, 3])],
    )
    def test_which_problems(self, problems, numbers):
        assert [attempts[0].problem for attempts in chosen(problems=problems)] == numbers

    def test_failed_problems_where_none_is_mixed(self):
        rewards = [[[0, 0], [1, 1], [0, 0]]]
        assert [attempts[0].problem for attempts in chosen(rewards=rewards)] == [0, 2]
        assert chosen(rewards=rewards, problems="mixed") == []
        assert chosen(rewards=[[[1, 1]]]) == []

    def test_limits_draw_by_the_seed_and_keep_the_order(self):
        draws = {
            tuple(a[0].problem for a in chosen(seed, problems="all", max_problems=2)) for seed in range(40)
        }
        assert draws == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
        assert chosen(3, max_attempts=2) == chosen(3, max_attempts=2)

    @pytest.mark.parametrize(("most", "right"), [(1, 0), (2, 1), (3, 1), (4, 2), (0, 2)])
    def test_half_of_the_attempts_are_right(self, most, right):
        for seed in range(5):
            first = chosen(seed, max_attempts=most)[0]
            assert len(first) == (most or 4) and first == sorted(first)
            assert sum(attempt.sample in (1, 3) for attempt in first) == right

    def test_wrong_ones_fill_up_where_few_are_right_and_the_other_way_around(self):
        assert len(chosen(rewards=[[[0, 0, 0, 1]]], max_attempts=3)[0]) == 3
        few_wrong = chosen(rewards=[[[1, 1, 1, 0]]], max_attempts=3)[0]
        assert len(few_wrong) == 3 and Attempt(0, 0, 3) in few_wrong


class TestShown:
    def values(self, summaries=None, **settings):
        rollouts = rollouts_of([PARENT], [[[0, 1]]])
        said = (("There is no box.", ""),)
        rollouts = dataclasses.replace(rollouts, feedback=(said,))
        return problem_values(
            rollouts, [Attempt(0, 0, 0), Attempt(0, 0, 1)], summaries or {}, Reflection(**settings)
        )

    def test_short_attempts_as_they_are_with_feedback(self):
        attempts = "1. wrong: reply 000\n2. right: reply 001\nFeedback on attempt 1: There is no box."
        assert self.values() == {
            "problem": "What is 10 + 20?",
            "answer": "30",
            "attempts": attempts,
            "case": f"Task: What is 10 + 20?\nCorrect answer: 30\nAttempts:\n{attempts}",
        }

    @pytest.mark.parametrize(
        ("show", "case"),
        [
            (("verdict",), "Attempts:\n- wrong\n- right"),
            (("task", "verdict"), "Task: What is 10 + 20?\nAttempts:\n- wrong\n- right"),
            (("gold", "feedback"), "Correct answer: 30\nFeedback on 1 of 2 attempts: There is no box."),
            (
                ("trajectory", "feedback"),
                "Attempts:\n1. reply 000\n2. reply 001\nFeedback on attempt 1: There is no box.",
            ),
        ],
    )
    def test_each_part_is_a_choice(self, show, case):
        assert self.values(show=show)["case"] == case

    def test_summaries_where_there_are_some(self):
        summaries = {Attempt(0, 0, 0): "Summary: It guessed.", Attempt(0, 0, 1): None}
        assert self.values(summaries)["attempts"] == (
            "1. wrong: It guessed.\n2. right: (no summary)\nFeedback on attempt 1: There is no box."
        )


class Scripted:
    """An `Answerer` that notes its questions; each call gets the next script for all of them."""

    def __init__(self, *scripts):
        self.scripts, self.calls = list(scripts), []

    def ask(self, questions):
        assert all(isinstance(question, Question) for question in questions)
        self.calls.append(list(questions))
        script = self.scripts[len(self.calls) - 1]
        return [Reply(text=script) if isinstance(script, str) else script for _ in questions]


def searched(*messages):
    return [{"role": role, "content": content, **rest} for role, content, rest in messages]


PROBLEM = Problem("q", "What is 17 + 25?", "42")
CASES = {
    "no box": (
        Arithmetic("boxed"),
        "It is 42.",
        r"There is no answer in a box. The answer has to be written as \boxed{...}.",
    ),
    "no number in the box": (
        Arithmetic("boxed"),
        r"\boxed{x}",
        "There is no number in the box. The answer is one number.",
    ),
    "no number": (Arithmetic(), "forty-two", "There is no number in the reply. The answer is one number."),
    "wrong number": (Arithmetic(), "41", "The answer that was read, 41, is wrong."),
    "math, no box": (
        Math(),
        "42",
        r"There is no answer in a box. The answer has to be written as \boxed{...}.",
    ),
    "math, wrong": (Math(), r"\boxed{41}", "The answer that was read, 41, is wrong."),
    "math, another kind": (
        Math(),
        r"\boxed{x+1}",
        "The answer that was read, x+1, is wrong. It has to be an integer.",
    ),
    "math, too long": (
        Math(),
        r"\boxed{" + "1" * 2001 + "}",
        "The box holds 2001 characters; it has to hold the final answer alone.",
    ),
    "no answer line": (
        Search(None),
        searched(
            ("assistant", "", {"tool_calls": [{}]}),
            ("tool", 'Error: "query_list" is empty.', {"error": "malformed"}),
            ("tool", "Error: down.", {"error": "failed"}),
            ("tool", "Nothing was found.", {"error": "nothing"}),
            ("assistant", "42", {}),
        ),
        '1 of 3 calls could not be read: "query_list" is empty. 1 of 3 searches failed. 1 of 3 searches '
        "found nothing. The last turn has no line that begins with `Answer:`.",
    ),
    "nothing searched": (
        Search(None),
        searched(("assistant", "Answer: 7", {})),
        "Nothing was searched. The answer that was read, '7', is wrong.",
    ),
    "a call at the end": (
        Search(None),
        searched(
            ("assistant", "", {"tool_calls": [{}]}),
            ("tool", "text", {}),
            ("assistant", "", {"tool_calls": [{}]}),
        ),
        "The last of 2 turns called a tool and gave no answer.",
    ),
    "the example's": (
        Guess(),
        [{"role": "assistant", "content": "7"}],
        "1 guesses did not find the number; the last was 7.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_feedback_of_each_environment_reaches_the_reflector(case):
    environment, reply, feedback = CASES[case]
    (grade,) = checked_grades(environment, [PROBLEM], [reply])
    assert grade.feedback == feedback and not grade.success and "42" not in grade.feedback
    rollouts = rollouts_of([PARENT], [[[grade.reward, grade.reward]]])
    rollouts = dataclasses.replace(rollouts, feedback=(((grade.feedback, grade.feedback),),))
    reflect = Scripted("ADD: Check the carry.", "NONE")
    child = mutate(PARENT, rollouts, reflect).child
    asked = user_turn(reflect.calls[0][0].conversation)
    assert asked.count(f"Feedback on all attempts: {feedback}") == 1
    assert child.principles == (*PARENT.principles, "Check the carry.")


@pytest.mark.parametrize(
    ("environment", "reply"),
    [
        (Arithmetic("boxed"), r"\boxed{42}"),
        (Math(), r"\boxed{42}"),
        (Math(), r"\boxed{84/2}"),
        (Search(None), searched(("assistant", "Answer: 42", {}))),
    ],
)
def test_a_right_reply_gets_no_feedback(environment, reply):
    (grade,) = environment.grade([PROBLEM], [reply])
    assert grade.success and grade.feedback == ""


class TestStages:
    def test_one_stage_shows_all_problems_in_one_call(self):
        reflect = Scripted("ADD: Check the carry.\nREMOVE G1: It does not help.")
        settings = Evolution(reflection=Reflection(stages=1, problems="failed"))
        offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 0], [0, 0]]]), reflect, settings)
        ((question,),) = reflect.calls
        asked = user_turn(question.conversation)
        assert "Case 1\nTask: What is 10 + 20?" in asked and "Case 2\nTask: What is 11 + 21?" in asked
        assert offspring.child.principles == ("Add the ones.", "Check the carry.")
        assert [each["op"] for each in offspring.child.edits] == ["add", "remove"]

    def test_a_rewrite_of_principles_is_checked_one_by_one(self):
        reflect = Scripted("- Be brief.\n- Carry the ten.\n- What is 10 + 20?\n- " + "word " * 40)
        settings = Evolution(reflection=Reflection(stages=1, output="rewrite"))
        offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect, settings)
        assert offspring.child.principles == ("Be brief.", "Carry the ten.")
        assert offspring.drops == {"too_long": 1, "copies_problem": 1}
        assert offspring.child.edits == (
            {"op": "rewrite", "text": "Add.", "principles": ["Be brief.", "Carry the ten."]},
        )

    @pytest.mark.parametrize(
        ("reply", "text"),
        [
            ("```\nAdd the ones first.\n```", "Add the ones first."),
            ("Draft:\n```\nx\n```\nBetter:\n```text\nCarry.\n```\nDone.", "Carry."),
            ("Just this.", "Just this."),
            ("```\nAdd the ones", None),
            (Reply(text="Add the ones first and", ended=False), None),
        ],
    )
    def test_a_rewrite_of_prose_is_the_last_closed_fence(self, reply, text):
        settings = Evolution(form="prose", reflection=Reflection(stages=1, output="rewrite"))
        offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), Scripted(reply), settings)
        assert (offspring.child and offspring.child.text) == text
        assert text or offspring.reason == "no_edits"

    def test_prose_in_lines_numbers_its_sentences(self):
        parent = SystemPrompt("Add the numbers. Be brief.", id="p3")
        reflect = Scripted("CHANGE S1: Show the carry.\nADD: Check it.", "NONE")
        settings = Evolution(form="prose", reflection=Reflection(stages=1))
        offspring = mutate(parent, rollouts_of([parent], [[[0, 1]]]), reflect, settings)
        assert "S0. Add the numbers.\nS1. Be brief." in user_turn(reflect.calls[0][0].conversation)
        assert offspring.child.text == "Add the numbers. Show the carry.\n\nCheck it."


class TestReasoning:
    settings = Evolution(reflection=Reflection(stages=1, reasoning="brief"))

    def test_a_plain_function_is_asked_in_two_steps(self):
        calls = []

        def reflect(conversations):
            calls.append(conversations)
            return ["The carry was lost."] if len(calls) == 1 else ["ADD: Carry the ten."]

        offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect, self.settings)
        (first,), (second,) = calls
        assert second[:2] == first and "think" in first[-1]["content"] and "ADD:" not in first[-1]["content"]
        assert [turn["role"] for turn in second] == ["system", "user", "assistant", "user"]
        assert second[2]["content"] == "The carry was lost." and "ADD:" in second[3]["content"]
        (record,) = offspring.transcripts
        assert record["reasoning"] == "The carry was lost." and record["request"] == second[3]["content"]
        assert offspring.child.principles[-1] == "Carry the ten."

    @pytest.mark.parametrize("text", ["", "ADD: Carry the ten and then do"])
    def test_what_was_cut_off_gives_no_edit(self, text):
        reflect = Scripted(Reply(text=text, reasoning="So", ended=False))
        offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect, self.settings)
        assert (offspring.child, offspring.reason) == (None, "no_edits")
        assert offspring.drops == {"cut_off": 1, "truncated": 1}
        assert offspring.transcripts[0]["ended"] is False


class TestRejected:
    def test_refused_edits_are_shown_the_next_time(self):
        reflect = Scripted("ADD: Be brief.")
        settings = Evolution(reflection=Reflection(stages=1))
        offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect, settings)
        assert offspring.rejected == (Rejected("ADD: Be brief.", "the principle is in the list already"),)
        again = Scripted("ADD: Carry the ten.")
        mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), again, settings, rejected=offspring.rejected)
        asked = user_turn(again.calls[0][0].conversation)
        assert "- ADD: Be brief. (the principle is in the list already)" in asked

    def test_only_the_newest_and_each_once(self):
        listed = [Rejected(f"ADD: {i % 4}", "so") for i in range(6)]
        assert shown_rejected(listed, 2).endswith(":\n- ADD: 2 (so)\n- ADD: 3 (so)")
        assert shown_rejected(listed, 0) == shown_rejected([], 3) == ""

    def test_another_members_principle_is_refused(self):
        member = SystemPrompt(principles=("Carry the ten.",), id="p9")
        settings = Evolution(reflection=Reflection(stages=1))
        reflect = Scripted("ADD: carry the ten")
        offspring = mutate(
            PARENT,
            rollouts_of([PARENT, OTHER], [[[0, 1]], [[0, 1]]]),
            reflect,
            settings,
            members=[PARENT, member],
        )
        assert offspring.drops == {"copies_member": 1}

    def test_edits_that_made_a_prompt_worse(self):
        def played(*ranks):
            return tuple({"iteration": i, "rank": rank} for i, rank in ranks)

        root = SystemPrompt("Add.", tournaments=played((1, 0), (2, 0), (3, 1)))
        population = start([root], 9)
        edit = ({"op": "add", "id": "C0", "principle": "Guess."},)
        children = [
            SystemPrompt("Add.", ("Guess.",), parents=("p0",), operator="mutation", edits=edit),
            SystemPrompt("Add.", ("Think.",), parents=("p0",), operator="mutation", edits=edit),
        ]
        population = population.add(children, 1).population
        members = [
            dataclasses.replace(population.get("p1"), tournaments=played((2, 1))),
            dataclasses.replace(population.get("p2"), tournaments=played((2, 1), (3, 0))),
        ]
        population = population.replace(members)
        assert worse_than_parent(population, "p0") == [Rejected("ADD: Guess.", "it made the prompt worse")]
