"""Recorded replies come again in the order of the asking, and what was not recorded is counted."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_jax.reflectors.journal import Journal, digest
from espl_jax.reflectors.replay import ReplayReflector, Transcripts
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


def test_schemas_change_nothing(tmp_path):
    reflect = ReplayReflector(transcripts(tmp_path, record("a", "1"), record("a", "2")), iteration=1)
    assert reflect.constrained([asked("a")], [{"type": "object"}]) == ["1"]
    assert reflect([asked("a")]) == ["2"]


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
