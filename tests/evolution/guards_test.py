"""What is accepted of edits: short, general, new, and within the limits of a prompt."""

from espl_jax.evolution.edits import Add, Merge, Modify, Remove, Replace, apply_edits, drop_unknown
from espl_jax.evolution.guards import (
    Guards,
    drop_copies,
    drop_echoes,
    drop_excess,
    drop_members,
    drop_not_allowed,
    drop_repeats,
    drop_too_large,
    drop_too_long,
)
from espl_jax.types import Problem, SystemPrompt


def problems_of(*texts):
    return [Problem(f"q{i}", text, "") for i, text in enumerate(texts)]


def test_limits_of_a_stage():
    edits = (Add("a b"), Modify("G0", "c"), Remove("G0"))
    assert drop_not_allowed(edits, (Add, Modify))[0] == edits[:2]
    kept, drops = drop_excess(edits, 2)
    assert kept == edits[:2]
    assert [reason for reason, _ in drops] == ["too_many"]
    assert drop_unknown(edits, ["G1"])[0] == edits[:1]


def test_repeats_are_dropped():
    entries = {"G0": "Check the sum.", "C0": "Think."}
    edits = (
        Add("check the SUM"),
        Add("New one."),
        Add("New one"),
        Modify("G0", "Check the sum."),
        Merge(("G0", "C0"), "Think."),
        Remove("G0"),
    )
    kept, drops = drop_repeats(edits, entries)
    assert kept == (edits[1], edits[4], edits[5])
    assert [reason for reason, _ in drops] == ["repeat"] * 3


def test_quotations_of_problems_are_dropped():
    problems = problems_of(
        "What is 27 + 58?",
        "Let ABC be a triangle with sides a, b and c such that the sum is odd.",
        "Add.",
    )
    edits = (
        Add("what is 27 + 58? It is 85."),
        Add("If ABC be a triangle with sides a, b and c such that, draw it."),
        Add("Add the ones, then 27."),
        Add("58 and then 27 make a sum."),
        Add("Let ABC be a triangle with sides a, b and c, and draw it."),  # a run of 11
        Replace("what is 27 + 58", "Let the sum be odd."),  # gone, not brought in
        Replace("", "So, what is 27 + 58"),
        Remove("G0"),
    )
    kept, drops = drop_copies(edits, problems, Guards())
    assert kept == (edits[2], edits[4], edits[5], edits[7])
    assert [reason for reason, _ in drops] == ["copies_problem"] * 4
    assert drop_copies(edits, problems, Guards(copied_tokens=0)) == (edits, ())


def test_any_training_problem_counts_in_tokens_of_the_model():
    text = "A farmer has four sheep, and every one of them eats two bales a day in the winter."
    train = problems_of(text)
    copy = Add("Remember that every one of them eats two bales a day, in the winter too.")  # 12 words
    assert drop_copies([copy], (), Guards(problems=train))[1][0][0] == "copies_problem"
    assert drop_copies([copy], (), Guards(problems=train, copied_tokens=13))[0] == (copy,)
    letters = Guards(problems=train, tokenize=list, copied_tokens=12)
    assert drop_copies([Add("Feed every one of us.")], (), letters)[1][0][0] == "copies_problem"
    assert drop_copies([Add("Feed them every day.")], (), letters)[0] == (Add("Feed them every day."),)


def test_answers_are_given_away_by_whole_words():
    problems = [Problem("a", "x", "1,850"), Problem("b", "y", r"\frac{1}{2}"), Problem("c", "z", "Ada Byron")]
    edits = (
        Add("Say 1850."),
        Add("It is 11850 or 18.50 always."),
        Add(r"Try $\dfrac{1}{2}$ first."),
        Add("Often 1/2 is right."),
        Add("Ask who Byron was."),
        Modify("G0", "Mostly ada byron"),
    )
    kept, drops = drop_copies(edits, problems, Guards())
    assert kept == (edits[1], edits[4])
    assert [reason for reason, _ in drops] == ["copies_answer"] * 4
    assert drop_copies(edits, problems, Guards(copied_answers=False)) == (edits, ())


def test_short_and_common_answers_count_where_they_are_called_answers():
    problems = [
        Problem("a", "x", "10"),
        Problem("b", "y", "no"),
        Problem("c", "z", "7"),
        Problem("d", "w", "True"),
    ]
    harmless = (
        Add("Keep 10 digits."),
        Add("If no source helps, search again."),
        Add("Check 7 times that it holds true."),
    )
    telling = (Add("The answer is no."), Add("Reply 7."), Modify("G0", "Here x = 2, and the answer: 10"))
    assert drop_copies(harmless, problems, Guards())[0] == harmless
    assert [reason for reason, _ in drop_copies(telling, problems, Guards())[1]] == ["copies_answer"] * 3


def test_how_many_problems_are_worded_stands_for_none_of_them():
    wording = "where m and n are relatively prime positive integers find the sum m plus n"
    train = problems_of(
        *(f"The {name} has area m over n, {wording}." for name in ("disk", "cone", "cube", "ring"))
    )
    edit = Add(f"If the task says {wording}, reduce the fraction.")
    assert drop_copies([edit], (), Guards(problems=train))[0] == (edit,)
    assert drop_copies([edit], (), Guards(problems=train[:3]))[1][0][0] == "copies_problem"


def test_principles_without_spaces_have_a_length_too():
    guards = Guards(max_words=2)
    long = "先读题。" * 10
    assert guards.too_long(Add(long)) and not guards.too_long(Add("先读题。"))
    assert drop_too_long((Add(long), Remove("G0")), guards)[0] == (Remove("G0"),)


def test_an_edit_that_makes_the_prompt_too_large_is_refused_alone():
    before = SystemPrompt(principles=("one two", "three four five"))
    guards = Guards(max_prompt_tokens=9, max_principles=3)

    def apply(edits):
        return apply_edits(before, edits)

    edits = (Modify("G0", "one two six seven eight nine"), Add("ten"), Add("more"), Remove("G1"), Add("last"))
    kept, drops = drop_too_large(edits, apply, guards)
    # 7 tokens with their numbers; the modify would make 11, the second add a fourth principle.
    assert kept == (edits[1], edits[3], edits[4])
    assert [reason for reason, _ in drops] == ["over_budget", "no_room"]
    # A prompt that is too large already may shrink.
    small = Guards(max_prompt_tokens=3)
    kept, drops = drop_too_large((Modify("G1", "three"), Modify("G0", "one two four")), apply, small)
    assert kept == (Modify("G1", "three"),) and [reason for reason, _ in drops] == ["over_budget"]


def test_echoes_of_what_the_reflector_was_told_are_refused():
    told = [
        "Propose edits of the principles that would have turned wrong attempts into right ones.",
        "ADD: [a new principle]",
    ]
    echo = Add("Edits: would have turned, wrong attempts into right ones. And more.")
    for edit in (echo, Add("a new principle"), Modify("G0", "Wrong attempts, into right ones")):
        assert drop_echoes((edit,), told, Guards())[1][0][0] == "copies_template"
        assert drop_echoes((edit,), told, Guards(copied_templates=False))[0] == (edit,)
    # A word or two in common, and fewer than eight in a row within something longer, are no echo.
    fine = (
        Add("New principle"),
        Add("Turned wrong attempts into right ones by checking the sum again."),
        Remove("G0"),
    )
    assert drop_echoes(fine, told, Guards())[0] == fine


def test_what_another_member_says_is_refused():
    others = [SystemPrompt(principles=("Carry the ten.",)), SystemPrompt("prose")]
    edits = (Add("carry the TEN"), Add("Carry."), Remove("G0"))
    kept, drops = drop_members(edits, others, Guards())
    assert kept == edits[1:] and [reason for reason, _ in drops] == ["copies_member"]
    assert drop_members(edits, others, Guards(copied_members=False))[0] == edits
