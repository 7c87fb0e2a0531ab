"""Runs whose reflector is elsewhere: a server that fails, a kill, a record, time that the update hides."""

import functools
import io
import json
import threading

import pytest
from rich.console import Console

from espl_jax import train as loop
from espl_jax.reflectors.openai_server import OpenAIServer
from espl_jax.run import parts, reflection, update
from espl_jax.run.reflection import Beside
from espl_jax.train import train
from tests.reflectors import faulty_server
from tests.support import fakes
from tests.train_test import lines, optimizer, outcome


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    fakes.take_over(monkeypatch)
    monkeypatch.setattr(parts, "make_optimizer", optimizer)
    monkeypatch.setattr(reflection, "OpenAIServer", functools.partial(OpenAIServer, first_wait=0.01))


def run(path, address, **changes):
    settings = {
        "reflection__reflector": "openai",
        "reflection__base_url": address,
        "reflection__model": "m",
        "reflection__max_retries": 1,
        "reflection__timeout": 1.0,
        "reflection__price_input": 1e6,
        "reflection__max_new_tokens": 256,
        "evaluation__every": 0,
        "data__test": "",
    }
    shown = io.StringIO()
    results = train(fakes.config(**settings | changes), path, Console(file=shown, width=200))
    return results, shown.getvalue()


def good(request, number, wait=0.0):
    """A reply of use at every stage."""
    (reply,) = fakes.scripted_replies([request["messages"]])
    return faulty_server.answer(reply, wait)


FAULTS = {
    "timeout": faulty_server.dribble(3.0),
    "rate_limit": faulty_server.error(429, Retry_After="0"),
    "server_error": faulty_server.error(500),
    "connection": faulty_server.half,
    "body": faulty_server.body(b"<html>{"),
    "refused": faulty_server.error(400, "too long"),
}


@pytest.mark.slow
def test_a_server_out_of_order_costs_its_iterations_mutation_alone(tmp_path, monkeypatch):
    """One fault an iteration, between a first and a last iteration without any."""
    faults = [None, *FAULTS.values(), faulty_server.closed, None]
    finished, save = [], loop.save

    def script(request, number):
        fault = faults[min(len(finished), len(faults) - 1)]
        return fault if fault else good(request, number)

    def save_and_count(workdir, run):
        save(workdir, run)
        finished.append(run.iteration)

    monkeypatch.setattr(loop, "save", save_and_count)
    with faulty_server.serve(script) as server:
        run(tmp_path, server.address, num_iterations=len(faults))
    for record, name in zip(lines(tmp_path, "metrics")[1:], FAULTS, strict=False):
        assert record["reflector"][f"failed_{name}"] > 0
    first, *broken, last = lines(tmp_path, "metrics")
    assert first["children"] and last["children"] and first["reflector"]["failed"] == 0
    assert last["reflector"]["cost"] == last["reflector"]["prompt_tokens"] > 0
    for record in broken:
        assert record["no_child"]["mutation"] == "no_replies" and record["children"] == []
        assert record["drops"]["no_reply"] == record["reflector"]["failed"] == record["reflector"]["requests"]
        assert record["grad_norm"] > 0 and record["skipped_updates"] == 0  # weights went on learning
    assert all(each["reply"] is None for each in lines(tmp_path, "reflections") if 1 < each["iteration"] < 9)


def test_a_run_that_is_killed_asks_nothing_twice(tmp_path, monkeypatch):
    save, ask = loop.save, OpenAIServer.ask
    # On a busy machine a reply may take longer than the second that other tests allow.
    patient = {"num_iterations": 3, "reflection__timeout": 60.0}

    class Killed(BaseException):
        pass

    with faulty_server.serve(good) as server:
        run(tmp_path / "whole", server.address, **patient)
        once = len(server.asked)
        # Between an iteration's replies and its checkpoint, ...
        monkeypatch.setattr(
            loop, "save", lambda workdir, run: save(workdir, run) if run.iteration < 2 else kill()
        )

        def kill():
            raise Killed

        with pytest.raises(Killed):
            run(tmp_path / "parts", server.address, **patient)
        monkeypatch.setattr(loop, "save", save)
        before = len(server.asked) - once
        assert 0 < before < once

        # ... and in the middle of a stage, with some replies there and the others not asked for.
        async def ask_some(self, client, conversation, schema):
            if len(server.asked) >= once + before + 2:
                raise RuntimeError("the power is gone")
            return await ask(self, client, conversation, schema)

        monkeypatch.setattr(OpenAIServer, "ask", ask_some)
        with pytest.raises(RuntimeError, match="the power is gone"):
            run(tmp_path / "parts", server.address, **patient, reflection__concurrency=1)
        monkeypatch.setattr(OpenAIServer, "ask", ask)
        assert len(server.asked) == once + before + 2
        run(tmp_path / "parts", server.address, **patient)
        assert len(server.asked) == 2 * once
    # The rest is as if nothing had happened.
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_a_wrong_key_stops_the_run_and_nothing_is_lost(tmp_path):
    with faulty_server.serve(good) as server:
        run(tmp_path, server.address, num_iterations=1)
    with (
        faulty_server.serve(lambda *_: faulty_server.error(401)) as server,
        pytest.raises(RuntimeError, match=r"(?s)reflection.base_url=.*401.*OPENAI_API_KEY"),
    ):
        run(tmp_path, server.address, num_iterations=2)
    with faulty_server.serve(good) as server:
        _, shown = run(tmp_path, server.address, num_iterations=2)
    assert "resumed after iteration 1" in shown
    assert [record["iteration"] for record in lines(tmp_path, "metrics")] == [1, 2]


def test_a_record_takes_the_servers_place(tmp_path):
    with faulty_server.serve(good) as server:
        run(tmp_path / "asked", server.address)
    for name in ("reflections", "replies"):
        record = str(tmp_path / "asked" / f"{name}.jsonl")
        run(tmp_path / name, "", reflection__reflector="replay", reflection__replay=record)
        assert lines(tmp_path / name, "lineage") == lines(tmp_path / "asked", "lineage")
        assert [each["reflector"]["unrecorded"] for each in lines(tmp_path / name, "metrics")] == [0, 0]
        assert not (tmp_path / name / "replies.jsonl").exists()
    # Other rollouts lead to other questions.
    run(tmp_path / "other", "", reflection__reflector="replay", reflection__replay=record, seed=1)
    assert lines(tmp_path / "other", "metrics")[0]["no_child"]["mutation"] == "no_replies"


def test_reflection_elsewhere_is_hidden_behind_the_update(tmp_path, monkeypatch):
    """The update does not end before the server was asked, nor does it wait for the answer."""
    asked, updated = threading.Event(), threading.Event()
    step = update.policy_gradient_step

    def script(request, number):
        asked.set()
        assert updated.wait(60)
        return good(request, number)

    def step_in_company(*args, **kwargs):
        assert asked.wait(60)
        result = step(*args, **kwargs)
        updated.set()
        return result

    monkeypatch.setattr(update, "policy_gradient_step", step_in_company)
    with faulty_server.serve(script) as server:
        run(tmp_path, server.address, num_iterations=1, reflection__timeout=60.0)
    times = lines(tmp_path, "metrics")[0]["time"]
    assert 0 < times["reflection_hidden"] < times["reflection_total"]
    waited = times["reflection_total"] - times["reflection_hidden"]
    assert waited == pytest.approx(times["reflection"], rel=0.1, abs=0.05)
    assert lines(tmp_path, "metrics")[0]["children"]


def test_beside_hands_on_results_and_errors():
    assert Beside(lambda: 3).result() == 3

    def fail():
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        Beside(fail).result()
    started = Beside(lambda: None)
    started.result()
    assert started.times()["reflection_total"] >= started.times()["reflection_hidden"] >= 0


def test_replies_are_kept_to_schemas_unless_told_otherwise(tmp_path):
    formats = {}
    for constrained in (True, False):
        with faulty_server.serve(good) as server:
            run(
                tmp_path / str(constrained),
                server.address,
                num_iterations=1,
                reflection__constrained=constrained,
            )
            formats[constrained] = [request.get("response_format") for request, _ in server.asked]
    assert not any(formats[False]) and any(formats[True])
    sent = next(filter(None, formats[True]))
    assert sent["type"] == "json_schema" and "add" in json.dumps(sent)
