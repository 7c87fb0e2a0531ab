"""A server that fails in every way: what is asked again, what is given up, what stops, and what is kept."""

import asyncio
import email.utils
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from absl import logging

from espl_jax.reflectors.journal import Journal
from espl_jax.reflectors.openai import OpenAIReflector
from espl_jax.reflectors.openai_server import FAILURES, OpenAIServer
from espl_jax.reflectors.replay import ReplayReflector, Transcripts
from espl_jax.types import Question, Reply
from tests.conftest import ROOT
from tests.reflectors import faulty_server as faulty
from tests.support.messages import assistant, system, user

KEY = "sk-this-is-a-secret"
SCHEMA = {"type": "object", "properties": {"edits": {"type": "array"}}, "required": ["edits"]}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def asked(text):
    return [system("Say what happened."), user(text)]


def server_of(served, **settings):
    settings = {"concurrency": 8, "timeout": 5.0, "max_retries": 2, "first_wait": 0.01} | settings
    settings = {"model": "a-model", "temperature": 0.7, "max_new_tokens": 64} | settings
    return OpenAIServer(base_url=served.address, **settings)


def reflector(served, journal=None, iteration=1, **settings):
    return OpenAIReflector(server_of(served, **settings), iteration=iteration, journal=journal)


def asked_under(texts, *grammars, **fields):
    """One question each, under these grammars; one grammar is for all."""
    grammars = grammars if len(grammars) > 1 else grammars * len(texts)
    return [
        Question(conversation=asked(text), grammar=grammar, **fields)
        for text, grammar in zip(texts, grammars, strict=True)
    ]


def texts_of(replies):
    """What whole replies say."""
    assert all(reply.ended and not reply.reasoning for reply in replies)
    return [reply.text for reply in replies]


def counted(reflect):
    """The counts that are not zero."""
    return {name: count for name, count in reflect.counts.items() if count}


def fails(*behaviours):
    """A script that gives every question these behaviours in turn, and good answers after them."""
    return lambda request, number: behaviours[number] if number < len(behaviours) else None


def unfinished(content, finish_reason, **fields):
    """An answer with the status of success that may say why it is none."""
    return faulty.body(faulty.good_body(content, 0, 0, finish_reason, **fields))


def beside_an_error(finish, in_choice=False):
    """An answer with a part of a reply and an error, with the status of success."""
    answer = json.loads(faulty.good_body("cut off in the mid", 0, 0, finish))
    (answer["choices"][0] if in_choice else answer)["error"] = {"code": 502, "message": "upstream is gone"}
    return faulty.body(json.dumps(answer).encode())


def test_replies_come_in_order_and_the_request_is_as_configured():
    wait = {"a": 0.2, "b": 0.0, "c": 0.1}
    script = lambda request, number: faulty.answer(wait=wait[request["messages"][-1]["content"]])  # noqa: E731
    with faulty.serve(script) as served:
        reflect = reflector(served, price_input=2.0, price_output=10.0)
        assert reflect([asked(text) for text in "abc"]) == [f"answer 0 to {text}" for text in "abc"]
        request, headers = served.asked[0]
    expected = {"model": "a-model", "temperature": 0.7, "max_tokens": 64}
    assert request == {**expected, "messages": asked(request["messages"][-1]["content"])}
    assert headers["authorization"] == f"Bearer {KEY}"
    assert reflect.counts == {
        **dict.fromkeys(("retries", "failed", *(f"failed_{reason}" for reason in FAILURES)), 0),
        **{"requests": 3, "prompt_tokens": 30, "completion_tokens": 9},
        "cost": (30 * 2.0 + 9 * 10.0) / 1e6,
    }
    assert reflect([]) == [] and reflect.counts["requests"] == 3


def test_a_server_that_failed_a_round_is_left_alone_for_the_iteration(tmp_path):
    conversations = [asked(text) for text in "abcdefgh"]
    dead = lambda request, number: faulty.error(500)  # noqa: E731
    with faulty.serve(dead) as served, Journal(tmp_path / "j") as journal:
        reflect = reflector(served, journal, concurrency=2, max_retries=0)
        assert reflect(conversations) == [None] * 8
        tried = len(served.asked)
        assert tried in (3, 4)  # three in a row, and perhaps one that was under way
        assert reflect([asked("another")]) == [None] and len(served.asked) == tried
        assert counted(reflect) == {
            "requests": 9,
            "failed": 9,
            "failed_server_error": tried,
            "failed_not_asked": 9 - tried,
        }
        # An iteration that is done again leaves it alone too, and the next one tries again.
        again = reflector(served, journal, concurrency=2, max_retries=0)
        assert again([*conversations, asked("another"), asked("new")]) == [None] * 10
        assert len(served.asked) == tried
        assert reflector(served, journal, iteration=2, max_retries=0)([asked("a")]) == [None]
        assert len(served.asked) == tried + 1
    # An answer in between, and be it a refusal, shows that it is there.
    some = lambda request, number: faulty.error(400 if request["messages"][-1]["content"] in "cf" else 500)  # noqa: E731
    with faulty.serve(some) as served:
        assert reflector(served, concurrency=1, max_retries=0)(conversations) == [None] * 8
        assert len(served.asked) == 8


@pytest.mark.parametrize(
    ("content", "reply"),
    [
        ("<think>Hm.</think>\n\nYes.", "Yes."),
        ("Hm.</think>Yes.", "Yes."),
        ("", ""),
        ("half \ud83d", "half ?"),
        ([{"type": "thinking", "thinking": []}, {"type": "text", "text": "Yes."}, {"type": "text"}], "Yes."),
    ],
)
def test_what_a_reply_is(content, reply, tmp_path):
    with faulty.serve(fails(faulty.answer(content))) as served, Journal(tmp_path / "j") as journal:
        assert reflector(served, journal)([asked("a")]) == [reply]
        assert reflector(served, journal)([asked("a")]) == [reply]
        assert len(served.asked) == 1


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (faulty.dribble(3.0), "timeout"),
        (faulty.answer(wait=3.0), "timeout"),
        (faulty.closed, "connection"),
        (faulty.half, "connection"),
        (faulty.error(429), "rate_limit"),
        (faulty.error(408), "server_error"),
        (faulty.error(409), "server_error"),
        (faulty.error(500), "server_error"),
        (faulty.error(503), "server_error"),
        (faulty.body(b"<html>busy</html>"), "body"),
        (faulty.body(faulty.good_body("x")[:30]), "body"),
        (faulty.body(b"[" * 100_000), "body"),
        (faulty.body(b"\xff\xfe"), "body"),
        (faulty.body(b"[]"), "body"),
        (faulty.body(b'{"error": {"message": "overloaded"}}'), "body"),
        (faulty.body(b'{"choices": []}'), "body"),
        (faulty.body(b'{"choices": [{"message": {}}], "usage": 3}'), "body"),
        (faulty.body(b'{"choices": null, "usage": {"prompt_tokens": null}}'), "body"),
        (unfinished("", "error"), "server_error"),
        (unfinished("cut off in the mid", "error"), "server_error"),
        (unfinished("cut off in the mid", "abort"), "server_error"),
        (unfinished("", "tool_calls"), "body"),
        *(
            (unfinished("cut off in the mid", finish), "server_error")
            for finish in ("network_error", "MALFORMED_FUNCTION_CALL", "incomplete", "no-reason-we-know")
        ),
        (beside_an_error(finish="stop"), "server_error"),
        (beside_an_error(finish=None), "server_error"),
        (beside_an_error(finish="stop", in_choice=True), "server_error"),
    ],
)
def test_what_may_pass_is_asked_again_and_given_up_at_last(behaviour, reason, tmp_path):
    settings = {"timeout": 0.3} if reason == "timeout" else {}
    with faulty.serve(fails(behaviour, behaviour)) as served, Journal(tmp_path / "one") as journal:
        begin = time.monotonic()
        reflect = reflector(served, journal, **settings)
        assert reflect([asked("a")]) == ["answer 2 to a"]
        tokens = {"prompt_tokens": 10, "completion_tokens": 3}
        assert counted(reflect) == {"requests": 1, "retries": 2, **tokens}
        assert time.monotonic() - begin < 2.5
    with faulty.serve(fails(*[behaviour] * 3)) as served, Journal(tmp_path / "two") as journal:
        reflect = reflector(served, journal, **settings)
        assert reflect([asked("a")]) == [None]
        assert counted(reflect) == {"requests": 1, "retries": 2, "failed": 1, f"failed_{reason}": 1}
        # It was final: the iteration done again takes the same course, though the server is well by now.
        again = reflector(served, journal, **settings)
        assert again([asked("a")]) == [None]
        assert again.counts == reflect.counts and again.replayed == 1 and len(served.asked) == 3


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (unfinished("", "length"), "length"),
        (unfinished(None, "length"), "length"),
        (unfinished("<think>Let me see", "length"), "length"),
        (unfinished([{"type": "thinking", "thinking": []}], "MAX_TOKENS"), "length"),
        (unfinished("", "content_filter"), "filtered"),
        (unfinished("cut off in the mid", "content_filter"), "filtered"),
        (unfinished("cut off in the mid", "content-filter"), "filtered"),
        (unfinished("cut off in the mid", "refusal"), "filtered"),
        (unfinished("cut off in the mid", "Sensitive"), "filtered"),
        (unfinished(None, "stop", refusal="I can't help with that."), "filtered"),
    ],
)
def test_a_reply_that_the_next_attempt_would_lack_too_is_counted_and_not_asked_again(behaviour, reason):
    with faulty.serve(fails(behaviour)) as served:
        reflect = reflector(served, concurrency=1)
        assert reflect([asked(text) for text in "abcd"]) == [None] * 4
        assert counted(reflect) == {"requests": 4, "failed": 4, f"failed_{reason}": 4}
        assert len(served.asked) == 4, "a server that answers is not left alone"


@pytest.mark.parametrize("finish", ["length", "STOP", "eos_token", "end-turn", "tool_calls", "", None, 0])
def test_a_reply_is_one_as_far_as_it_goes(finish):
    with faulty.serve(fails(unfinished("[{", finish))) as served:
        assert reflector(served)([asked("a")]) == ["[{"] and len(served.asked) == 1


def test_tokens_of_attempts_without_a_reply_are_paid_too():
    with faulty.serve(fails(faulty.body(faulty.good_body(None, 100, 50)))) as served:
        reflect = reflector(served, price_input=1.0)
        assert reflect([asked("a")]) == ["answer 1 to a"]
    expected = {"requests": 1, "retries": 1, "prompt_tokens": 110, "completion_tokens": 53, "cost": 110 / 1e6}
    assert counted(reflect) == expected


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_says_how_long_to_wait(form):
    date = email.utils.formatdate(time.time() + 2.5, usegmt=True)  # whole seconds: up to one less
    told = {"seconds": "1.2", "date": date}[form]
    with faulty.serve(fails(faulty.error(429, Retry_After=told))) as served:
        begin = time.monotonic()
        assert reflector(served)([asked("a")]) == ["answer 1 to a"]
        assert 1.0 < time.monotonic() - begin < 4.0


@pytest.mark.parametrize("told", ["3600", "inf", "nan", "-5", "soon", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_no_server_says_to_wait_for_ever(told):
    with faulty.serve(fails(faulty.error(503, Retry_After=told))) as served:
        begin = time.monotonic()
        assert reflector(served, longest_wait=0.1)([asked("a")]) == ["answer 1 to a"]
        assert time.monotonic() - begin < 1.5


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_conversation_is_not_asked_again(status, tmp_path):
    too_long = faulty.error(status, "the context length is 8192 tokens, you asked for max_tokens=64 more")
    script = lambda request, number: too_long if request["messages"][-1]["content"] == "b" else None  # noqa: E731
    with faulty.serve(script) as served, Journal(tmp_path / "j") as journal:
        reflect = reflector(served, journal)
        assert reflect([asked("a"), asked("b")]) == ["answer 0 to a", None]
        counts = reflect.counts
        assert (counts["requests"], counts["retries"], counts["failed_refused"]) == (2, 0, 1)
        # Sent again with the other name of the part it names, refused too: later requests go as before.
        assert served.questions() == {"a": 1, "b": 2}
        assert reflect([asked("c")]) == ["answer 0 to c"] and "max_tokens" in served.asked[-1][0]
        again = reflector(served, journal)
        assert again([asked("a"), asked("b")]) == ["answer 0 to a", None] and again.replayed == 2
    failures = [json.loads(line)["said"] for line in (tmp_path / "j").read_text().splitlines()]
    assert any(said and said.startswith(f"{status}: ") and "8192" in said for said in failures)


@pytest.mark.parametrize(
    ("status", "fix"),
    [
        (401, "put a valid key"),
        (402, "add funds"),
        (403, "another model"),
        (404, "correct reflection.base_url"),
        (405, "correct reflection.base_url"),
    ],
)
def test_errors_of_the_configuration_stop_at_once_and_keep_what_arrived(status, fix, tmp_path):
    broken = True

    def script(request, number):
        if broken and request["messages"][-1]["content"] == "b":
            return faulty.repeating_headers(status)

    with faulty.serve(script) as served, Journal(tmp_path / "j") as journal:
        with pytest.raises(RuntimeError, match=fix) as raised:
            reflector(served, journal, concurrency=1)([asked(text) for text in "abc"])
        message = str(raised.value)
        for part in (served.address, "a-model", "OPENAI_API_KEY", f"answered {status}", "Bearer [key]"):
            assert part in message
        assert served.questions() == {"a": 1, "b": 1}
        broken = False
        reflect = reflector(served, journal)
        assert reflect([asked(text) for text in "abc"]) == ["answer 0 to a", "answer 1 to b", "answer 0 to c"]
        assert served.questions() == {"a": 1, "b": 2, "c": 1}
        assert (reflect.counts["requests"], reflect.replayed) == (3, 1)


def test_no_funds_is_no_rate_limit():
    with (
        faulty.serve(fails(faulty.error(429, "insufficient_quota: check your plan"))) as served,
        pytest.raises(RuntimeError, match="add funds"),
    ):
        reflector(served)([asked("a")])


def refusing(*names):
    """A script of a server that takes none of these parts."""

    def script(request, number):
        for name in names:
            if name in request:
                return faulty.error(400, f"Unsupported parameter: '{name}' is not supported with this model.")

    return script


def test_a_schema_is_sent_and_left_out_where_the_server_refuses_it(tmp_path):
    with faulty.serve() as served:
        assert texts_of(reflector(served).ask(asked_under("a", SCHEMA))) == ["answer 0 to a"]
        form = served.asked[0][0]["response_format"]
        expected = {"name": "edits", "schema": SCHEMA, "strict": True}
        assert form == {"type": "json_schema", "json_schema": expected}
    with faulty.serve(refusing("response_format")) as served, Journal(tmp_path / "j") as journal:
        server = server_of(served)
        reflect = OpenAIReflector(server, iteration=1, journal=journal)
        assert texts_of(reflect.ask(asked_under("a", SCHEMA))) == ["answer 1 to a"]
        assert texts_of(reflect.ask(asked_under("b", SCHEMA))) == ["answer 0 to b"]
        another = OpenAIReflector(server, iteration=2)
        assert texts_of(another.ask(asked_under("c", SCHEMA))) == ["answer 0 to c"]
        assert served.questions() == {"a": 2, "b": 1, "c": 1}
        assert (reflect.counts["requests"], reflect.counts["retries"], reflect.counts["failed"]) == (2, 0, 0)
        # A new process has not learnt it, and what was journalled is the same for it.
        again = reflector(served, journal)
        assert texts_of(again.ask(asked_under("ab", SCHEMA))) == ["answer 1 to a", "answer 0 to b"]
        assert again.counts == reflect.counts and again.replayed == 2
        # Another schema, or none, is another request.
        assert again.ask(asked_under("d", SCHEMA)) != again.ask(asked_under("d", {}))
        assert again([asked("a")]) == ["answer 2 to a"]


def test_lines_are_asked_for_without_a_grammar(tmp_path):
    """Servers share no grammar but JSON schema; the journal does not tell a grammar from none either."""
    with faulty.serve() as served, Journal(tmp_path / "j") as journal:
        questions = asked_under("abc", 'start: "NONE"', SCHEMA, None)
        expected = ["answer 0 to a", "answer 0 to b", "answer 0 to c"]
        assert texts_of(reflector(served, journal).ask(questions)) == expected
        sent = {request["messages"][-1]["content"]: request for request, _ in served.asked}
        assert ["response_format" in sent[text] for text in "abc"] == [False, True, False]
        again = reflector(served, journal)
        assert texts_of(again.ask(asked_under("a", None))) == ["answer 0 to a"] and again.replayed == 1


def test_a_reply_out_of_tokens_is_said_not_to_have_ended(tmp_path):
    script = lambda request, number: unfinished("[{", request["messages"][-1]["content"])  # noqa: E731
    reasons = ["length", "MAX_TOKENS", "stop", "tool_calls", ""]
    with faulty.serve(script) as served, Journal(tmp_path / "j") as journal:
        for _ in range(2):  # from the server, and from the journal
            replies = reflector(served, journal).ask(asked_under(reasons, SCHEMA))
            assert [reply.text for reply in replies] == ["[{"] * 5
            assert [reply.ended for reply in replies] == [False, False, True, True, True]
        assert len(served.asked) == 5
    recorded = ReplayReflector(Transcripts(tmp_path / "j"), iteration=1)
    assert recorded.ask(asked_under(reasons, SCHEMA)) == replies


REQUEST = "Now the edits."


def brief(texts, grammar):
    return asked_under(texts, grammar, reasoning="brief", request=REQUEST)


class TestBriefReasoning:
    def script(self, request, number):
        """Reasoning that depends on the first question; what happens to it and to the reply as it says."""
        question = request["messages"][1]["content"]
        reasons = len(request["messages"]) == 2
        turn, how, *_ = question.split()
        if (turn == "first") != reasons:
            return faulty.answer("Because of it." if reasons else "ADD: x")
        return {
            "cut": unfinished("Let me", "length"),
            "refused": faulty.error(400, "no"),
            "filtered": unfinished("", "content_filter"),
            "spent": unfinished("<think>Let me", "length"),
            "well": faulty.answer("Because." if reasons else "ADD: y"),
        }[how]

    @pytest.mark.parametrize("grammar", [None, SCHEMA, 'start: "NONE"'])
    def test_two_requests_the_second_with_the_reasoning_as_a_turn(self, grammar):
        with faulty.serve() as served:
            reflect = reflector(served)
            replies = reflect.ask(brief("ab", grammar))
            requests = [request for request, _ in served.asked]
        reasoning = [f"answer 0 to {text}" for text in "ab"]
        assert [reply.reasoning for reply in replies] == reasoning
        assert {reply.text for reply in replies} == {f"answer {i} to {REQUEST}" for i in range(2)}
        assert all(reply.ended for reply in replies)
        assert sorted(request["messages"][-1]["content"] for request in requests[:2]) == ["a", "b"]
        firsts = {request["messages"][-1]["content"]: request["messages"] for request in requests[:2]}
        for text, thought in zip("ab", reasoning, strict=True):
            assert firsts[text] == asked(text)
            expected = [*asked(text), assistant(thought), user(REQUEST)]
            assert expected in [request["messages"] for request in requests[2:]]
        has_form = ["response_format" in request for request in requests]
        assert has_form == [False, False] + [grammar is SCHEMA] * 2
        assert reflect.counts["requests"] == 4 and not reflect.counts["failed"]

    @pytest.mark.parametrize(
        ("question", "reply", "requests"),
        [
            ("first well", Reply(text="ADD: x", reasoning="Because."), 2),
            ("first cut", Reply(text="", reasoning="Let me", ended=False), 1),
            ("first refused", None, 1),
            ("first filtered", None, 1),
            ("first spent", None, 1),
            ("second well", Reply(text="ADD: y", reasoning="Because of it."), 2),
            ("second cut", Reply(text="Let me", reasoning="Because of it.", ended=False), 2),
            ("second refused", None, 2),
            ("second filtered", None, 2),
            ("second spent", None, 2),
        ],
    )
    def test_what_becomes_of_it_is_the_same_from_server_journal_and_replay(
        self, question, reply, requests, tmp_path
    ):
        questions = brief(["first well too", question, "second well too"], SCHEMA)
        first = Reply(text="ADD: x", reasoning="Because.")
        last = Reply(text="ADD: y", reasoning="Because of it.")
        path = tmp_path / "replies.jsonl"
        with faulty.serve(self.script) as served, Journal(path) as journal:
            reflect = reflector(served, journal)
            assert reflect.ask(questions) == [first, reply, last]
            assert len(served.asked) == requests + 4 == reflect.counts["requests"]
            again = reflector(served, journal)
            assert again.ask(questions) == [first, reply, last]
            assert len(served.asked) == again.replayed == requests + 4 and again.counts == reflect.counts
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        assert [entry["schema"] is None for entry in entries] == [
            len(entry["conversation"]) == 2 for entry in entries
        ]
        recorded = ReplayReflector(Transcripts(path), iteration=1)
        assert recorded.ask(questions) == [first, reply, last]
        assert recorded.counts == {"requests": requests + 4, "failed": reply is None, "unrecorded": 0}

    def test_the_same_question_twice_is_reasoned_about_twice(self, tmp_path):
        with faulty.serve() as served, Journal(tmp_path / "j") as journal:
            replies = reflector(served, journal, concurrency=1).ask(brief("aa", SCHEMA))
            assert [reply.reasoning for reply in replies] == ["answer 0 to a", "answer 1 to a"]
            assert reflector(served, journal).ask(brief("aa", SCHEMA)) == replies
            assert len(served.asked) == 4

    def test_own_reasoning_is_left_to_the_server(self):
        with faulty.serve(fails(faulty.answer("<think>Hm.</think>ADD: x"))) as served:
            (reply,) = reflector(served).ask(asked_under("a", SCHEMA, reasoning="model"))
            assert reply == Reply(text="ADD: x") and len(served.asked) == 1
            assert "response_format" in served.asked[0][0]


def test_several_parts_are_refused_one_after_the_other():
    with faulty.serve(refusing("max_tokens", "temperature", "response_format")) as served:
        reflect = reflector(served)
        assert texts_of(reflect.ask(asked_under("a", SCHEMA))) == ["answer 3 to a"]
        last = {"model": "a-model", "messages": asked("a"), "max_completion_tokens": 64}
        assert served.asked[-1][0] == last
        assert texts_of(reflect.ask(asked_under("b", SCHEMA))) == ["answer 0 to b"]
        assert counted(reflect)["requests"] == 2 and "retries" not in counted(reflect)


def test_what_was_refused_stays_refused_in_a_retry():
    def script(request, number):
        if "temperature" in request:
            return faulty.error(400, "temperature must be left out")
        return [None, faulty.error(500), None][number]

    with faulty.serve(script) as served:
        reflect = reflector(served)
        assert reflect([asked("a")]) == ["answer 2 to a"]
        assert ["temperature" in request for request, _ in served.asked] == [True, False, False]
        assert reflect.counts["retries"] == 1


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_than_so_many_at_once(concurrency):
    with faulty.serve(lambda request, number: faulty.answer(wait=0.1)) as served:
        conversations = [asked(f"{i}") for i in range(9)]
        replies = reflector(served, concurrency=concurrency)(conversations)
        assert replies == [f"answer 0 to {i}" for i in range(9)]
        assert served.most == concurrency


def test_the_same_conversation_again_is_another_request(tmp_path):
    with faulty.serve() as served, Journal(tmp_path / "j") as journal:
        reflect = reflector(served, journal, concurrency=1)
        assert reflect([asked("a"), asked("b"), asked("a")]) == [
            "answer 0 to a",
            "answer 0 to b",
            "answer 1 to a",
        ]
        assert reflect([asked("a")]) == ["answer 2 to a"]
        assert reflector(served, journal)([asked("a")] * 3) == [f"answer {i} to a" for i in range(3)]
        assert served.questions() == {"a": 3, "b": 1}
        # Another iteration, model or setting: other requests. Another address, concurrency or price: not.
        for other in ({"iteration": 2}, {"model": "b"}, {"temperature": 0.0}, {"max_new_tokens": 9}):
            assert reflector(served, journal, **other)([asked("b")]) == [
                f"answer {served.questions()['b'] - 1} to b"
            ]
        assert served.questions()["b"] == 5
        assert reflector(served, journal, concurrency=2, price_input=1.0)([asked("b")]) == ["answer 0 to b"]
    with Journal(tmp_path / "j") as journal:
        reflect = reflector(served, journal)  # the server is gone
        assert reflect([asked("b")]) == ["answer 0 to b"] and reflect.replayed == 1


def test_replies_are_journalled_as_they_arrive(tmp_path):
    path = tmp_path / "j"
    lines = []

    def script(request, number):
        if request["messages"][-1]["content"] == "slow":
            deadline = time.monotonic() + 5
            while not path.read_bytes().count(b"\n") and time.monotonic() < deadline:
                time.sleep(0.01)
            lines.extend(path.read_text().splitlines())

    with faulty.serve(script) as served, Journal(path) as journal:
        assert reflector(served, journal)([asked("slow"), asked("fast")]) == [
            "answer 0 to slow",
            "answer 0 to fast",
        ]
    (entry,) = map(json.loads, lines)
    assert entry["conversation"] == asked("fast") and entry["reply"] == "answer 0 to fast"
    assert entry["usage"] == {"prompt_tokens": 10, "completion_tokens": 3}
    assert (entry["iteration"], entry["model"], entry["failure"]) == (1, "a-model", None)


def test_the_key_is_nowhere(tmp_path, caplog):
    script = fails(*[faulty.repeating_headers(500)] * 3)
    logging.use_python_logging()
    with caplog.at_level("DEBUG"), faulty.serve(script) as served, Journal(tmp_path / "j") as journal:
        reflect = reflector(served, journal)
        assert reflect([asked("a")]) == [None]
        assert "1 of 1 replies could not be had" in caplog.text and "Bearer [key]" in caplog.text
        assert served.asked[0][1]["authorization"] == f"Bearer {KEY}"
    assert KEY not in caplog.text and KEY not in (tmp_path / "j").read_text()
    assert KEY not in repr(vars(reflect))


@pytest.mark.parametrize("variable", ["", "UNSET_VARIABLE"])
def test_a_server_without_keys_gets_a_placeholder(variable):
    with faulty.serve(fails(None, faulty.error(401))) as served:
        reflect = reflector(served, api_key_variable=variable)
        assert reflect([asked("a")]) == ["answer 0 to a"]
        assert served.asked[0][1]["authorization"] == "Bearer none"
        with pytest.raises(RuntimeError, match=f"api_key_variable='{variable}', which is not set"):
            reflect([asked("a")])


def test_an_opening_is_refused():
    with faulty.serve() as served:
        with pytest.raises(ValueError, match=r"reflection\.opening"):
            reflector(served)([[*asked("a"), assistant("Summary:")]])
        assert served.asked == []


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"base_url": ""}, "reflection.base_url='': give an address"),
        ({"base_url": "localhost:8000/v1"}, "reflection.base_url='localhost:8000/v1': give an address"),
        ({"base_url": "http://"}, "reflection.base_url='http://': give an address"),
        ({"base_url": "http://x:y/v1"}, "reflection.base_url='http://x:y/v1': give an address"),
        ({"base_url": "http://x/v1/chat/completions"}, "leave out /chat/completions"),
        ({"model": ""}, "reflection.model='': give the name"),
        ({"concurrency": 0}, "reflection.concurrency=0: give at least 1"),
        ({"timeout": 0}, "reflection.timeout=0: give more"),
        ({"max_retries": -1}, "reflection.max_retries=-1: give at least 0"),
        ({"price_input": -1.0}, "reflection.price_input=-1.0: give at least 0"),
        ({"price_output": float("nan")}, "reflection.price_output=nan: give at least 0"),
        ({"api_key_variable": "sk-pasted-here"}, "reflection.api_key_variable is not the name"),
        ({"api_key_variable": "CURLY"}, "reflection.api_key_variable='CURLY': the value"),
    ],
)
def test_bad_settings_are_named(settings, complaint, monkeypatch):
    monkeypatch.setenv("CURLY", "sk-“quoted”")
    good = {"base_url": "http://x/v1", "model": "m", "temperature": 1.0, "max_new_tokens": 1}
    good |= {"concurrency": 1, "timeout": 1.0, "max_retries": 0}
    OpenAIServer(**good)
    with pytest.raises(ValueError) as raised:
        OpenAIServer(**good | settings)
    assert complaint in str(raised.value)
    assert "sk-" not in str(raised.value)


def test_any_thread_may_ask():
    with faulty.serve() as served:
        replies = []
        thread = threading.Thread(target=lambda: replies.extend(reflector(served)([asked("a")])))
        thread.start()
        thread.join()
        assert replies == ["answer 0 to a"]

        async def elsewhere():
            return await asyncio.to_thread(reflector(served), [asked("b")])

        assert asyncio.run(elsewhere()) == ["answer 0 to b"]


ASKING = """
import sys
from tests.reflectors.openai_test import ask_twenty
print(ask_twenty(*sys.argv[1:]))
"""


def ask_twenty(address, path):
    """Two batches, equal conversations among them."""
    with Journal(path) as journal:
        server = server_of(faulty.Served(address), concurrency=3)
        reflect = OpenAIReflector(server, iteration=5, journal=journal)
        replies = reflect([asked(f"{i % 6}") for i in range(12)])
        replies += texts_of(reflect.ask(asked_under("01234567", SCHEMA)))
        return replies, reflect.counts, reflect.replayed


@pytest.mark.slow
def test_killed_and_resumed_no_reply_that_arrived_is_asked_for_again(tmp_path):
    path = tmp_path / "replies.jsonl"
    unstable = fails(faulty.error(503))

    def script(request, number):
        return unstable(request, number) or faulty.answer("the same", wait=0.15)

    with faulty.serve(script) as served:
        expected, expected_counts, _ = ask_twenty(served.address, tmp_path / "whole.jsonl")
        served.asked.clear()
        entries = []
        for lines in (4, 11):
            process = subprocess.Popen([sys.executable, "-c", ASKING, served.address, path], cwd=ROOT)
            deadline = time.monotonic() + 60
            while not path.exists() or path.read_bytes().count(b"\n") < lines:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            entries.append([json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]])
        arrived = entries[-1]
        assert 11 <= len(arrived) < 20
        before = len(served.asked)
        replies, counts, replayed = ask_twenty(served.address, path)
    assert replayed == len(arrived) and len(served.asked) - before >= 20 - len(arrived)
    assert replies == expected
    everything = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(everything) == len({entry["key"] for entry in everything}) == 20
    # Each that had not arrived was asked once more, and a 503 was all that a retry was for.
    retries = {"retries": sum(entry["retries"] for entry in everything)}
    assert {**counts, **retries} == counts
    assert {**counts, "retries": 0} == {**expected_counts, "retries": 0}
    assert len(served.asked) - before == 20 - len(arrived) + sum(
        entry["retries"] for entry in everything[len(arrived) :]
    )


def test_the_environment_variable_is_what_decides(monkeypatch):
    monkeypatch.setenv("MY_KEY", "  another-key\n")
    with faulty.serve() as served:
        reflector(served, api_key_variable="MY_KEY")([asked("a")])
        assert served.asked[0][1]["authorization"] == "Bearer another-key"
        assert os.environ["OPENAI_API_KEY"] == KEY


def test_a_full_disk_stops_the_run(tmp_path, monkeypatch):
    def full(key, entry):
        raise OSError(28, "the disk is full")

    with faulty.serve() as served, Journal(tmp_path / "j") as journal:
        monkeypatch.setattr(journal, "add", full)
        with pytest.raises(OSError, match="the disk is full"):
            reflector(served, journal)([asked("a"), asked("b")])
