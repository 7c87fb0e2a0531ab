"""Mutation with a scripted reflector: which calls are made, and what becomes of the replies."""

import json

import numpy as np
import pytest

from espl_jax.evolution.edits import replay_edits
from espl_jax.evolution.guards import Guards
from espl_jax.types import Problem, Reply, Rollouts, SystemPrompt
from tests.support.evolving import mutate

PARENT = SystemPrompt(text="Add.", principles=("Add the ones.", "Be brief."), id="p3", mu=31.0, sigma=4.0)
OTHER = SystemPrompt(text="Other.", id="p4")


def rollouts_of(prompts, rewards):
    """Rollouts of M prompts with the rewards given, [M, B, N]; a reward above 1/2 is a success."""
    rewards = np.array(rewards, np.float32)
    m, b, n = rewards.shape
    empty = np.zeros((m, b, n, 0))
    return Rollouts(
        prompts=tuple(prompts),
        problems=tuple(Problem(f"q{j}", f"What is {10 + j} + {20 + j}?", str(30 + 2 * j)) for j in range(b)),
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
        replies=tuple(tuple(tuple(f"reply {i}{j}{k}" for k in range(n)) for j in range(b)) for i in range(m)),
        answers=tuple(tuple(tuple(None for _ in range(n)) for _ in range(b)) for _ in range(m)),
        rewards=rewards,
        success=rewards > 0.5,
    )


class Scripted:
    """Answers each stage with its script: one reply for all conversations, or a list of them."""

    def __init__(self, *stages):
        self.stages = list(stages)
        self.calls = []

    def __call__(self, conversations):
        self.calls.append(list(conversations))
        script = self.stages[len(self.calls) - 1]
        return [script] * len(conversations) if isinstance(script, str) else script


def edits(*items):
    return json.dumps(list(items))


def add(principle):
    return {"op": "add", "principle": principle}


def user_turn(conversation):
    return next(message["content"] for message in conversation if message["role"] == "user")


def test_three_stages_by_hand():
    reflect = Scripted(
        "Summary: The attempt guessed.",
        edits(add("Carry the ten."), {"op": "modify", "id": "G1", "principle": "Give only the number."}),
        edits({"op": "merge", "ids": ["G0", "C0"], "principle": "Add the ones and carry."}),
    )
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1, 0], [1, 1, 1], [0, 0, 0]]]), reflect)
    assert [len(call) for call in reflect.calls] == [3, 1, 1]  # only the first problem is mixed
    child = offspring.child
    assert child.principles == ("Add the ones and carry.", "Be brief.")
    assert (child.text, child.parents, child.operator, child.id) == ("Add.", ("p3",), "mutation", "")
    assert (child.mu, child.sigma) == (31.0, pytest.approx(17**0.5))
    assert [edit["op"] for edit in child.edits] == ["add", "merge"]
    assert child.edits[0] == {"op": "add", "id": "C0", "principle": "Carry the ten."}
    assert child.evidence["problems"] == ["q0"]
    assert child.evidence["suggestions"][0]["id"] == "G1"
    assert offspring.drops == {}
    assert offspring.reason == ""


def test_the_reflector_sees_what_it_needs():
    reflect = Scripted("Summary: The attempt guessed.", edits(add("Carry the ten.")), "[]")
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect)
    summaries, (critique,), (revision,) = reflect.calls
    assert "reply 000" in user_turn(summaries[0])
    assert "Verdict: wrong" in user_turn(summaries[0])
    assert "Verdict: right" in user_turn(summaries[1])
    assert "Correct answer: 30" in user_turn(summaries[0])
    assert summaries[0][0] == summaries[1][0]  # a shared prefix
    assert "- wrong: The attempt guessed.\n- right: The attempt guessed." in user_turn(critique)
    assert "G1. Be brief." in user_turn(critique)
    assert "C0. Carry the ten." in user_turn(revision)
    assert [turn["role"] for turn in critique] == ["system", "user", "assistant"]
    assert [record["stage"] for record in offspring.transcripts] == ["summary"] * 2 + ["critique", "revision"]
    assert offspring.transcripts[2]["conversation"] is critique
    json.dumps(offspring.transcripts)


def test_without_opening_the_user_speaks_last():
    reflect = Scripted("s", edits(add("Carry the ten.")), "[]")
    mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect, opening=False)
    assert {conversation[-1]["role"] for call in reflect.calls for conversation in call} == {"user"}


def test_no_mixed_problem_means_no_call():
    reflect = Scripted()
    offspring = mutate(PARENT, rollouts_of([PARENT, OTHER], [[[1, 1], [0, 0]], [[0, 1], [0, 1]]]), reflect)
    assert (offspring.child, offspring.reason, reflect.calls) == (None, "no_problems", [])


def test_copies_are_pooled():
    """Neither copy is mixed by itself; together they are, and both are summarized."""
    reflect = Scripted("s", edits(add("Carry the ten.")), "[]")
    offspring = mutate(PARENT, rollouts_of([PARENT, OTHER, PARENT], [[[0, 0]], [[1, 1]], [[1, 1]]]), reflect)
    assert [len(call) for call in reflect.calls] == [4, 1, 1]
    assert [user_turn(c).count(f"reply {i}0{j}") for c, (i, j) in zip(
        reflect.calls[0], [(0, 0), (0, 1), (2, 0), (2, 1)], strict=True
    )] == [1, 1, 1, 1]  # fmt: skip
    assert offspring.child.principles == (*PARENT.principles, "Carry the ten.")


def test_rewards_need_not_be_zero_or_one():
    reflect = Scripted("s", edits(add("Carry the ten.")), "[]")
    mutate(PARENT, rollouts_of([PARENT], [[[0.25, 0.75], [-1.0, -1.0]]]), reflect)
    first, second = reflect.calls[0]
    assert "wrong (reward 0.25)" in user_turn(first)
    assert "right (reward 0.75)" in user_turn(second)


def test_unmentioned_candidates_become_principles():
    critiques = [edits(add("First new.")), edits(add("Second new.")), edits(add("first NEW"))]
    reflect = Scripted("s", critiques, "[]")
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]] * 3]), reflect)
    assert offspring.child.principles == (*PARENT.principles, "First new.", "Second new.")
    assert offspring.drops == {"repeat": 1}


def test_a_useless_revision_falls_back_on_the_critiques():
    suggestion = {"op": "modify", "id": "G0", "principle": "Add the ones first."}
    later = {"op": "modify", "id": "G0", "principle": "Another text for it."}
    reflect = Scripted("s", edits(add("Carry the ten."), suggestion, later), "I like them all!")
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect, guards=Guards(max_edits=3))
    assert offspring.child.principles == ("Add the ones first.", "Be brief.", "Carry the ten.")
    assert offspring.drops == {"no_edit": 1, "revision_unusable": 1, "conflict": 1}
    assert offspring.child.evidence["revision_unusable"] is True


def test_an_empty_revision_keeps_the_adds_alone():
    suggestion = {"op": "modify", "id": "G0", "principle": "Add the ones first."}
    reflect = Scripted("s", edits(suggestion), "[]")
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect)
    assert (offspring.child, offspring.reason) == (None, "unchanged")


def test_unknown_ids_never_create_principles():
    reflect = Scripted(
        "s",
        edits({"op": "modify", "id": "G7", "principle": "From nowhere."}, add("Carry the ten.")),
        edits(
            {"op": "modify", "id": "C5", "principle": "From nowhere."},
            {"op": "merge", "ids": ["G0", "G9"], "principle": "From nowhere."},
            {"op": "add", "principle": "Not offered here."},
            {"op": "modify", "id": "C0", "principle": "Carry every ten."},
        ),
    )
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect)
    assert offspring.child.principles == (*PARENT.principles, "Carry every ten.")
    assert offspring.drops == {"unknown_id": 3, "not_allowed": 1}


def test_a_dict_for_a_list_is_read():
    reflect = Scripted("s", json.dumps(add("Carry the ten.")), json.dumps({"edits": []}))
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect)
    assert offspring.child.principles[-1] == "Carry the ten."


def test_useless_critiques_make_no_child_and_no_revision():
    reflect = Scripted("s", ["nothing", edits({"op": "remove", "id": "G0"})])
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1], [0, 1]]]), reflect)
    assert (offspring.child, offspring.reason) == (None, "no_edits")
    assert offspring.drops == {"no_edit": 1, "not_allowed": 1}
    assert len(reflect.calls) == 2


def test_limits_on_edits_words_and_principles():
    long = "Carry the ten over to the next column. " + "word " * 40
    critique = edits(add(long), add("Second new."), add("Third new."))
    reflect = Scripted("s", critique, critique, "[]")
    guards = Guards(max_edits=2, max_principles=3)
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect, guards=guards)
    assert offspring.child.principles == (*PARENT.principles, "Second new.")
    assert offspring.drops == {"too_many": 1, "retried": 1, "too_long": 1}
    assert replay_edits(PARENT, offspring.child.edits).principles == offspring.child.principles


def test_a_reply_with_too_long_a_principle_is_asked_for_once_more():
    long, short = edits(add("word " * 40)), edits(add("Carry the ten."))
    reflect = Scripted("s", [short, long, long], [edits(add("Be exact.")), "nothing"], "[]")
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]] * 3]), reflect)
    assert [len(call) for call in reflect.calls] == [6, 3, 2, 1]
    assert reflect.calls[2] == reflect.calls[1][1:]  # the same conversations again
    # The second reply counts if it is of use, else the first is refused: nothing is ever cut.
    assert offspring.child.principles == (*PARENT.principles, "Carry the ten.", "Be exact.")
    assert offspring.drops == {"retried": 2, "too_long": 1}
    assert offspring.rejected[0].why == "the principle has too many words"
    never = Guards(word_retries=0)
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), Scripted("s", long, "[]"), guards=never)
    assert offspring.drops == {"too_long": 1} and offspring.reason == "no_edits"


def test_the_budget_counts_candidates_that_a_merge_saves():
    """Two candidates do not fit beside each other; merged into one principle of the list they do."""
    guards = Guards(max_principles=2, max_edits=2)
    merge = {"op": "merge", "ids": ["G0", "C0", "C1"], "principle": "Add the ones, carry the ten, check."}
    reflect = Scripted("s", edits(add("Carry the ten."), add("Check it.")), edits(merge))
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect, guards=guards)
    assert offspring.child.principles == ("Add the ones, carry the ten, check.", "Be brief.")
    assert [edit["op"] for edit in offspring.child.edits] == ["add", "add", "merge"]
    assert offspring.drops == {}
    assert replay_edits(PARENT, offspring.child.edits).principles == offspring.child.principles


def test_candidates_of_a_refused_merge_are_weighed_alone():
    tokens = Guards(max_prompt_tokens=len(PARENT.render().split()) + 4)
    merge = {"op": "merge", "ids": ["C0", "C1"], "principle": "Carry the ten over and check all of it."}
    reflect = Scripted(
        "s", [edits(add("Carry the ten."), add("Check it.")), edits(add("Think once."))], edits(merge)
    )
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]] * 2]), reflect, guards=tokens)
    # There is room for one of four tokens, its number counted.
    assert offspring.child.principles == (*PARENT.principles, "Carry the ten.")
    assert offspring.drops == {"over_budget": 3}
    assert offspring.child.edits == ({"op": "add", "id": "C0", "principle": "Carry the ten."},)


PROSE = SystemPrompt(text="You add numbers. Be brief.", id="p3", mu=31.0, sigma=4.0)


def block(search, replace):
    return {"search": search, "replace": replace}


def test_prose_is_mutated_by_blocks():
    critique = edits(block("Be brief.", "Give only the number."), block("nowhere", "x"), add("Not here."))
    revision = edits(block("Be brief.", "Give the number alone."), block("", "Carry the ten."))
    reflect = Scripted("s", critique, revision)
    offspring = mutate(PROSE, rollouts_of([PROSE], [[[0, 1]]]), reflect, form="prose")
    child = offspring.child
    assert child.text == "You add numbers. Give the number alone.\n\nCarry the ten."
    assert (child.principles, child.parents, child.mu) == ((), ("p3",), 31.0)
    assert child.edits[1] == {"op": "replace", "search": "", "replace": "Carry the ten."}
    assert child.evidence["suggestions"] == [{"op": "replace", **block("Be brief.", "Give only the number.")}]
    assert offspring.drops == {"not_found": 1, "not_allowed": 1}
    assert replay_edits(PROSE, child.edits).text == child.text
    assert "Instructions:\nYou add numbers. Be brief." in user_turn(reflect.calls[1][0])
    assert "Search: Be brief.\nReplace: Give only the number." in user_turn(reflect.calls[2][0])


def test_blocks_that_no_longer_apply_are_dropped_one_by_one():
    critiques = [
        edits(block("Be brief.", "Think.")),
        edits(block("Be brief.", "Be slow."), block("", "End.")),
    ]
    reflect = Scripted("s", critiques, "I cannot decide.")
    offspring = mutate(PROSE, rollouts_of([PROSE], [[[0, 1]] * 2]), reflect, form="prose")
    assert offspring.child.text == "You add numbers. Think.\n\nEnd."
    assert offspring.drops == {"no_edit": 1, "revision_unusable": 1, "not_found": 1}
    small = Guards(max_prompt_tokens=5)
    reflect = Scripted("s", critiques, "[]")
    offspring = mutate(PROSE, rollouts_of([PROSE], [[[0, 1]] * 2]), reflect, form="prose", guards=small)
    assert (offspring.child, offspring.reason) == (None, "unchanged")
    reflect = Scripted("s", critiques, edits(block("", "More text than there is room for.")))
    offspring = mutate(PROSE, rollouts_of([PROSE], [[[0, 1]] * 2]), reflect, form="prose", guards=small)
    assert (offspring.reason, offspring.drops) == ("unchanged", {"over_budget": 1})


def test_a_copy_that_two_blocks_make_together_is_refused():
    parent = SystemPrompt(text="Let ABC be a triangle with sides a, b. End.", id="p3")
    guards = Guards(
        problems=[Problem("q", "Let ABC be a triangle with sides a, b and c such that the sum is odd.", "")]
    )
    reflect = Scripted("s", edits(block("End.", "and c such that the sum is odd.")), "[]", "no edits here")
    offspring = mutate(parent, rollouts_of([parent], [[[0, 1]]]), reflect, form="prose", guards=guards)
    assert offspring.reason == "unchanged"
    reflect = Scripted("s", edits(block("End.", "and c such that the sum is odd.")), "no edits here")
    offspring = mutate(parent, rollouts_of([parent], [[[0, 1]]]), reflect, form="prose", guards=guards)
    assert (offspring.reason, offspring.drops["copies_problem"]) == ("unchanged", 1)


def test_an_empty_reply_is_counted():
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), Scripted("s", ""))
    assert (offspring.reason, offspring.drops) == ("no_edits", {"no_edit": 1})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_reflector_out_of_order_costs_the_mutation_alone(stage):
    script = ["s", edits(add("Carry the ten.")), "[]"]
    script[stage] = [None] * (2 if stage == 0 else 1)
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), Scripted(*script))
    assert (offspring.child, offspring.reason) == (None, "no_replies")
    assert offspring.drops == {"no_reply": 2 if stage == 0 else 1}
    assert len(offspring.transcripts) == 2 + stage


def test_single_missing_replies_are_done_without():
    reflect = Scripted(["s", None, "s", "s"], [None, edits(add("Carry the ten."))], "[]")
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]] * 2]), reflect)
    assert offspring.child.principles == (*PARENT.principles, "Carry the ten.")
    assert offspring.drops == {"no_reply": 2}
    assert "right: (no summary)" in user_turn(reflect.calls[1][0])


class Constrained(Scripted):
    """A reflector that keeps to schemas, which it notes."""

    def __init__(self, *stages):
        super().__init__(*stages)
        self.schemas = []

    def ask(self, questions):
        self.schemas.extend(question.grammar for question in questions if question.grammar)
        return [Reply(text=text) for text in self([question.conversation for question in questions])]


def test_reflectors_that_keep_to_a_schema_get_one_and_no_opening():
    reflect = Constrained("s", edits(add("Carry the ten.")), "[]")
    mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect)
    summaries, critiques, revisions = reflect.calls
    assert summaries[0][-1]["role"] == "assistant"
    assert {call[0][-1]["role"] for call in (critiques, revisions)} == {"user"}
    critique, revision = map(json.dumps, reflect.schemas)
    assert "G1" in critique and "C0" not in critique
    assert "C0" in revision and "merge" in revision and '"add"' not in revision


def test_problems_do_not_enter_the_prompt():
    reflect = Scripted("s", edits(add("What is 10 + 20? It is 30."), add("Carry the ten.")), "[]")
    offspring = mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), reflect)
    assert offspring.child.principles == (*PARENT.principles, "Carry the ten.")
    assert offspring.drops == {"copies_problem": 1}


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="'p3' has no rollouts"):
        mutate(PARENT, rollouts_of([OTHER], [[[0, 1]]]), Scripted())
    with pytest.raises(ValueError, match="1 replies to the 2 conversations of the stage 'summary'"):
        mutate(PARENT, rollouts_of([PARENT], [[[0, 1]]]), Scripted(["only one"]))
