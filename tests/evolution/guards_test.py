"""What is accepted of edits: short, general, new, and within the limits of a prompt."""

import hypothesis
import hypothesis.strategies as st

from espl_jax.evolution.edits import Add, Merge, Modify, Remove, Replace, apply_edits, drop_unknown
from espl_jax.evolution.guards import (
    Guards,
    drop_copies,
    drop_excess,
    drop_not_allowed,
    drop_repeats,
    drop_too_large,
    shorten,
    shorten_edits,
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
    assert shorten(long, 2) == long[:24]


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


def test_shorten():
    assert shorten("one two three", 3) == "one two three"
    assert shorten("One two three four. Five six seven eight", 6) == "One two three four."
    assert shorten("One two three, four", 3) == "One two three"
    assert shorten("1. Two three four five", 4) == "1. Two three four"
    edits, cut = shorten_edits((Add("a b c"), Remove("G0"), Modify("G0", "a")), Guards(max_words=2))
    assert edits == (Add("a b"), Remove("G0"), Modify("G0", "a"))
    assert cut == 1


@hypothesis.given(st.text(), st.integers(1, 40))
def test_shorten_keeps_the_limit_and_a_beginning(principle, max_words):
    short = shorten(principle, max_words)
    assert len(short.split()) <= max_words
    assert " ".join(principle.split()).startswith(" ".join(short.split()))
