import concurrent.futures
import threading
import time

import pytest

from espl_jax.environments.retrievers.load import RetrievalError
from espl_jax.environments.search import Search, f1, final_answer, normalized
from espl_jax.types import Passage, Problem

PROBLEM = Problem("q", "Who wrote it?", "The Ada Book", aliases=("Ada B.",))


class Shelf:
    """Finds one passage for each query, which repeats it."""

    def __init__(self):
        self.asked = []

    def search(self, queries, count):
        self.asked.append((list(queries), count))
        return [[Passage("", f"about {query}")] if query != "nothing" else [] for query in queries]


def call(*queries, **other):
    return {"name": "search", "arguments": {"query_list": list(queries)}} | other


def turn(*calls, text="..."):
    return {"role": "assistant", "content": text, "tool_calls": list(calls)}


def said(environment, *transcript):
    answer = environment.respond(PROBLEM, list(transcript))
    return answer.result(timeout=10) if isinstance(answer, concurrent.futures.Future) else answer


def contents(messages):
    assert all(message["role"] == "tool" for message in messages)
    return [message["content"] for message in messages]


def test_each_call_is_answered_by_what_it_finds():
    shelf = Shelf()
    messages = said(Search(shelf, passages=2), turn(call("Ada", "Bob"), call("Ada", "nothing")))
    assert contents(messages) == [
        "Ada\n[1] about Ada\n\nBob\n[1] about Bob",
        "Ada\n[1] about Ada\n\nnothing\nNothing was found.",
    ]
    assert shelf.asked == [(["Ada", "Bob", "nothing"], 2)], "one search of a turn, no query twice"
    assert not any("error" in message for message in messages)
    (nothing,) = said(Search(shelf), turn(call("nothing")))
    assert nothing["error"] == "nothing" and nothing["content"] == "nothing\nNothing was found."


def test_a_turn_without_a_call_is_the_last():
    assert said(Search(Shelf()), {"role": "assistant", "content": "Answer: Ada"}) is None


def test_turns_are_limited_and_the_model_is_told():
    environment = Search(Shelf(), max_turns=3)
    transcript = [turn(call("a"))]
    for last in (False, True):
        messages = said(environment, *transcript)
        assert messages[-1]["content"].endswith("Answer in your next turn.") is last
        transcript += [*messages, turn(call("b"))]
    assert said(environment, *transcript) is None
    assert said(Search(Shelf(), max_turns=1), turn(call("a"))) is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"error": "the call is not JSON"}, "the call is not JSON"),
        (call("a", name="lookup"), "there is no tool 'lookup'; the only one is search"),
        ({"name": "search", "arguments": {}}, 'search needs "query_list", a list of strings'),
        ({"name": "search", "arguments": {"query_list": [1]}}, "a list of strings"),
        (call(), '"query_list" is empty'),
        (call(" "), '"query_list" is empty'),
    ],
)
def test_a_malformed_call_is_answered_with_what_is_wrong(wrong, words):
    (message,) = said(Search(None), turn(wrong))
    assert words in message["content"] and message["error"] == "malformed"
    # A good call beside it is answered all the same.
    bad, good = said(Search(Shelf()), turn(wrong, call("Ada")))
    assert bad == message and "error" not in good and "about Ada" in good["content"]


def test_long_passages_are_cut():
    class Long:
        def search(self, queries, count):
            return [[Passage("Title", " ".join(map(str, range(200)))), Passage("Other", "1 2 3")]]

    (message,) = said(Search(Long(), max_passage_words=3), turn(call("a")))
    assert message["content"] == "a\n[1] Title: 0 1 2 ...\n[2] Other: 1 2 3"


class TestBrokenRetrievers:
    @pytest.mark.parametrize(
        ("search", "words"),
        [
            (lambda *_: (_ for _ in ()).throw(RetrievalError("no one answers")), "no one answers"),
            (lambda *_: 1 / 0, "ZeroDivisionError"),
            (lambda *_: None, "TypeError"),
            (lambda *_: [], "ValueError"),
            (lambda queries, _: ["junk"] * len(queries), "AttributeError"),
        ],
        ids=["dead", "raises", "none", "too few", "junk"],
    )
    def test_the_model_is_told(self, search, words):
        class Broken:
            pass

        retriever = Broken()
        retriever.search = search
        (message,) = said(Search(retriever), turn(call("a")))
        assert message["content"] == f"Error: the search failed, {words}." and message["error"] == "failed"

    def test_one_that_hangs_is_given_up_and_holds_up_no_other(self):
        hung, release = [], threading.Event()

        class Hangs:
            def search(self, queries, count):
                if queries == ["slow"]:
                    hung.append(1)
                    release.wait(60)
                return [[Passage("", "found")] for _ in queries]

        environment = Search(Hangs(), timeout=0.2, concurrency=1)
        start = time.monotonic()
        answers = [environment.respond(PROBLEM, [turn(call("slow"))]) for _ in range(3)]
        told = [answer.result(timeout=10) for answer in answers]
        assert {message["error"] for (message,) in told} == {"failed"}
        assert "longer than 0.2 seconds" in told[0][0]["content"]
        assert time.monotonic() - start < 5
        # Its place is free again, though its thread still hangs.
        (message,) = said(environment, turn(call("quick")))
        assert "found" in message["content"] and hung
        release.set()


class TestGrading:
    def grade(self, text, *before, **settings):
        transcript = [*before, {"role": "assistant", "content": text}]
        return Search(None, **settings).grade([PROBLEM], [transcript])[0]

    @pytest.mark.parametrize(
        ("text", "answer", "success"),
        [
            ("Answer: The Ada Book", "The Ada Book", True),
            ("I think so.\nanswer:  ada book. ", "ada book.", True),
            ("Answer: Bob\nOr rather\n**Answer:** an Ada-book!", "an Ada-book!", False),
            ("Answer: Bob\nOr rather\n**Answer: Ada book**", "Ada book", True),
            ("Answer: ADA B", "ADA B", True),
            ("Answer: Ada", "Ada", False),
            ("The Ada Book", None, False),
            ("The answer: The Ada Book", None, False),
            ("Answer:", None, False),
            ("", None, False),
        ],
    )
    def test_the_last_answer_line_counts(self, text, answer, success):
        grade = self.grade(text)
        assert (grade.answer, grade.success, grade.reward) == (answer, success, float(success))

    def test_an_answer_in_a_passage_or_an_earlier_turn_does_not_count(self):
        passage = {"role": "tool", "content": "Answer: The Ada Book"}
        grade = self.grade("No idea.", turn(call("a"), text="Answer: The Ada Book"), passage)
        assert grade.answer is None and grade.reward == 0.0

    def test_rewards_are_composed(self):
        rewards = {"exact_match": 1, "f1": 0.5, "answered": 0.1, "searched": 0.2}
        rewards |= {"malformed_calls": -0.25, "failed_searches": -1}
        empty = {"role": "tool", "content": "", "error": "nothing"}
        assert self.grade("Answer: x", turn(), empty, rewards=rewards).metrics["searched"] == 0.0
        messages = [
            {"role": "tool", "content": "", "error": error} for error in ("malformed", "malformed", "failed")
        ]
        grade = self.grade(
            "Answer: ada cook", turn(), *messages, {"role": "tool", "content": ""}, rewards=rewards
        )
        # One of two words right: f1 is 0.5.
        assert grade.reward == pytest.approx(0 + 0.25 + 0.1 + 0.2 - 0.5 - 1)
        assert not grade.success
        assert grade.metrics == {
            "exact_match": 0.0,
            "f1": 0.5,
            "answered": 1.0,
            "searched": 1.0,
            "malformed_calls": 2.0,
            "failed_searches": 1.0,
            "searches": 4.0,
            "turns": 2.0,
        }


def test_answers_are_normalized():
    assert normalized("  The  U.S.A., an Ocean\n") == "usa ocean"
    assert normalized("theatre and a") == "theatre and"


def test_f1_of_words():
    assert f1("the cat sat", "cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert f1("dog", "cat") == f1("", "cat") == f1("the", "an") == 0.0


def test_final_answer_reads_markdown():
    assert final_answer("> **Answer**: `Ada`") == "Ada"
    assert final_answer("Answers: Ada") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_turns": 0}, "max_turns=0: give at least 1"),
        ({"timeout": 0}, "timeout=0: give seconds"),
        ({"rewards": {"exact": 1}}, r"rewards=\['exact'\] are unknown; choose from exact_match"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Search(None, **settings)


def test_the_question_asks_for_an_answer_line():
    assert Search(None).user_message(PROBLEM) == (
        "Who wrote it?\n\nEnd with a line that says `Answer:` and then the answer alone, in as few words as "
        "possible."
    )
    assert Search(None, instruction="").user_message(PROBLEM) == "Who wrote it?"
