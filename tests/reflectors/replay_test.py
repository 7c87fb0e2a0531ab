"""Recorded replies come again in the order of the asking, and what was not recorded is counted."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_jax.reflectors.journal import Journal, digest
from espl_jax.reflectors.replay import ReplayReflector, Transcripts
from espl_jax.types import Question, Reply
from tests.support.messages import assistant, system, user


def asked(text):
    return [system("Say what happened."), user(text)]


def record(text, reply, iteration=1, **fields):
    return {"iteration": iteration, "stage": "summary", "conversation": asked(text), "reply": reply, **fields}


def transcripts(tmp_path, *records):
    path = tmp_path / "reflections.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return Transcripts(path)


def test_equal_conversations_get_their_replies_in_order(tmp_path):
    recorded = transcripts(tmp_path, record("a", "1"), record("b", "2"), record("a", "3"), record("a", "4"))
    reflect = ReplayReflector(recorded, iteration=1)
    assert reflect([asked("a"), asked("b"), asked("a")]) == ["1", "2", "3"]
    assert reflect([asked("a")]) == ["4"]
    assert reflect.counts == {"requests": 4, "failed": 0, "unrecorded": 0}


def test_what_was_not_recorded_is_none_and_counted(tmp_path):
    reflect = ReplayReflector(transcripts(tmp_path, record("a", "1"), record("b", None)), iteration=1)
    assert reflect([asked("c"), asked("a"), asked("a"), asked("b")]) == [None, "1", None, None]
    assert reflect.counts == {"requests": 4, "failed": 3, "unrecorded": 2}
    opened = [*asked("a"), assistant("Summary:")]
    assert reflect([opened]) == [None]


def test_an_iteration_has_its_own_replies_first_and_those_of_others_after(tmp_path):
    recorded = transcripts(
        tmp_path, record("a", "1", 1), record("a", "2", 2), record("a", "2 again", 2), record("a", "3", 3)
    )
    in_turn = {
        1: ["1", "2", "2 again", "3", None],
        2: ["2", "2 again", "1", "3", None],
        7: ["1", "2", "2 again", "3", None],
    }
    for iteration, expected in in_turn.items():
        # Done again after a kill, the iteration sees the same.
        for _ in range(2):
            assert ReplayReflector(recorded, iteration=iteration)([asked("a")] * 5) == expected


def test_grammars_change_nothing(tmp_path):
    recorded = [record("a", f"{i}") for i in range(4)]
    reflect = ReplayReflector(transcripts(tmp_path, *recorded), iteration=1)
    for i, grammar in enumerate((None, {"type": "object"}, 'start: "x"')):
        assert reflect.ask([Question(conversation=asked("a"), grammar=grammar)]) == [Reply(text=f"{i}")]
    assert reflect([asked("a")]) == ["3"]


def test_a_reply_that_was_cut_off_is_cut_off_again(tmp_path):
    cut, whole = {"ended": False}, {"ended": True}
    of_a_server = {"cut_off": True}, {"cut_off": False}
    fields = (cut, whole, *of_a_server, {})
    recorded = [record("a", f"{i}", **each) for i, each in enumerate(fields)]
    reflect = ReplayReflector(transcripts(tmp_path, *recorded), iteration=1)
    replies = reflect.ask([Question(conversation=asked("a"))] * 5)
    assert [reply.text for reply in replies] == ["0", "1", "2", "3", "4"]
    assert [reply.ended for reply in replies] == [False, True, False, True, True]


REQUEST = "Now the edits."


def brief(text):
    return Question(conversation=asked(text), reasoning="brief", request=REQUEST)


def after(text, reasoning):
    """The conversation in which a server is asked for the reply."""
    return [*asked(text), assistant(reasoning), user(REQUEST)]


class TestBriefReasoning:
    def test_a_run_has_reasoning_and_reply_in_one_record(self, tmp_path):
        recorded = transcripts(
            tmp_path,
            record("a", "ADD: x", request=REQUEST, reasoning="So."),
            record("b", "ADD: y", request=REQUEST, reasoning="Hm.", ended=False),
            record("c", "", request=REQUEST, reasoning="Well, let me", ended=False),
            record("d", None, request=REQUEST),
            record("a", "ADD: z", request=REQUEST, reasoning=""),
        )
        reflect = ReplayReflector(recorded, iteration=1)
        replies = reflect.ask([brief(text) for text in "aabcde"])
        assert replies == [
            Reply(text="ADD: x", reasoning="So."),
            Reply(text="ADD: z"),
            Reply(text="ADD: y", reasoning="Hm.", ended=False),
            Reply(text="", reasoning="Well, let me", ended=False),
            None,
            None,
        ]
        assert reflect.counts == {"requests": 6, "failed": 2, "unrecorded": 1}

    def test_a_journal_has_them_in_two(self, tmp_path):
        path = tmp_path / "replies.jsonl"
        entries = [
            {"conversation": after("a", "Second."), "reply": "ADD: 2", "number": 0},
            {"conversation": asked("a"), "reply": "Second.", "number": 1},
            {"conversation": asked("a"), "reply": "First.", "number": 0},
            {"conversation": after("a", "First."), "reply": "ADD: 1", "number": 0, "cut_off": True},
            {"conversation": asked("b"), "reply": "Let me", "number": 0, "cut_off": True},
            {"conversation": asked("c"), "reply": None, "number": 0},
            {"conversation": asked("d"), "reply": "So.", "number": 0},
            {"conversation": after("d", "So."), "reply": None, "number": 0},
        ]
        with Journal(path) as journal:
            for entry in entries:
                entry = {"iteration": 1, "cut_off": False, **entry}
                journal.add(digest(entry), entry)
        reflect = ReplayReflector(Transcripts(path), iteration=1)
        assert reflect.ask([brief(text) for text in "aabcd"]) == [
            Reply(text="ADD: 1", reasoning="First.", ended=False),
            Reply(text="ADD: 2", reasoning="Second."),
            Reply(text="", reasoning="Let me", ended=False),
            None,
            None,
        ]
        assert reflect.counts == {"requests": 8, "failed": 2, "unrecorded": 0}

    def test_a_reply_that_was_not_recorded_after_its_reasoning_is_none(self, tmp_path):
        recorded = transcripts(
            tmp_path, record("a", "So."), {"conversation": after("a", "Hm."), "reply": "x"}
        )
        reflect = ReplayReflector(recorded, iteration=1)
        assert reflect.ask([brief("a")]) == [None]
        assert reflect.counts == {"requests": 2, "failed": 1, "unrecorded": 1}

    def test_the_model_s_own_reasoning_comes_with_its_reply(self, tmp_path):
        recorded = transcripts(tmp_path, record("a", "ADD: x", reasoning="Thinking."), record("a", "ADD: y"))
        reflect = ReplayReflector(recorded, iteration=1)
        question = Question(conversation=asked("a"), reasoning="model")
        assert reflect.ask([question] * 2) == [
            Reply(text="ADD: x", reasoning="Thinking."),
            Reply(text="ADD: y"),  # a server does not show it
        ]


def test_a_journal_is_read_by_numbers_and_not_by_arrival(tmp_path):
    path = tmp_path / "replies.jsonl"
    with Journal(path) as journal:
        for number in (2, 0, 1):
            entry = record("a", f"{number}", number=number)
            journal.add(digest(entry), entry)
    assert ReplayReflector(Transcripts(path), iteration=1)([asked("a")] * 3) == ["0", "1", "2"]


def test_records_without_iteration(tmp_path):
    plain = {"conversation": asked("a"), "reply": "1"}
    recorded = transcripts(tmp_path, plain, plain | {"reply": "2"})
    assert ReplayReflector(recorded, iteration=4)([asked("a")] * 2) == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "the file is empty"),
        ('{"conversation": [], "reply": "x"}\n{"conver', "line 2 is not JSON"),
        ("3\n", "line 1 has no conversation"),
        ('{"reply": "x"}\n', "line 1 has no conversation"),
        ('\n{"conversation": []}\n', "line 2 has no reply"),
        ('{"conversation": [], "reply": 3}\n', "line 1 has no reply"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, content, complaint):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"reflection\.replay=.*metrics\.jsonl.*{complaint}"):
        Transcripts(path)
    with pytest.raises(ValueError, match=r"reflection\.replay=.*there is no such file"):
        Transcripts(tmp_path / "absent.jsonl")


asking = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), max_size=20)


@settings(max_examples=50)
@given(questions=asking)
def test_a_run_replayed_has_all_of_its_replies(tmp_path_factory, questions):
    recorded = [record(text, f"{n}", iteration) for n, (text, iteration) in enumerate(questions)]
    recorded.append(record("z", "last", 9))
    made = transcripts(tmp_path_factory.mktemp("replay"), *recorded)
    for iteration in (1, 2, 3):
        own = [each for each in recorded if each["iteration"] == iteration]
        reflect = ReplayReflector(made, iteration=iteration)
        assert reflect([each["conversation"] for each in own]) == [each["reply"] for each in own]
        assert reflect.counts["unrecorded"] == 0
