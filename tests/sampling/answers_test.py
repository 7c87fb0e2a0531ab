"""When answers are appended; with two processes, only the first one requests them."""

import concurrent.futures
import hashlib
import json
import threading

import jax
import numpy as np
import pytest

from espl_jax.models.params import abstract
from espl_jax.parallel import sharding
from espl_jax.sampling import answers, draw
from espl_jax.sampling.answers import Answers
from tests.support import tiny
from tests.support.flat import sample_tree
from tests.support.two_processes import run_pair

CONFIG = tiny.CONFIG.replace(num_layers=1, num_heads=1, num_kv_heads=1)
STOPS = tuple(range(0, 61, 3))


def converse(delays):
    """Samples rows whose turns are answered after the given delays. Returns a summary of the samples."""
    mesh = sharding.make_mesh({"fsdp": 8})
    asked = []

    def respond(place, tokens):
        assert jax.process_index() == 0
        answer = [7, 8, sum(place) + len(tokens) % 5] if len(tokens) < 16 else None
        asked.append(place)
        delay = delays[len(asked) % len(delays)]
        if delay is None:
            return answer
        future = concurrent.futures.Future()
        threading.Timer(delay, future.set_result, [answer]).start()
        return future

    key = jax.random.key(0, impl="threefry2x32")
    params = sharding.place(tiny.params(CONFIG), abstract(CONFIG), mesh)
    samples = sample_tree(
        params,
        CONFIG,
        [[5, 6, 7, 8]],
        [[[9, 10], [11, 12, 13]]],
        draw.row_keys(key, *np.ogrid[0:1, 0:2, 0:4]),
        max_new_tokens=24,
        temperature=1.0,
        stop_ids=STOPS,
        chunk=8,
        respond=respond,
        mesh=mesh,
    )
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in samples[:-1])).hexdigest()
    appended = int(samples.lengths.sum() - samples.drawn.sum())
    return {
        "asked": len(asked),
        "appended": appended,
        "tokens": samples.tokens.tolist(),
        "all of it": digest,
    }


@pytest.mark.slow
def test_two_processes_hold_the_same_conversations():
    program = "import json\nfrom tests.sampling.answers_test import converse\n"
    program += "print(json.dumps(converse([0.0, None, 0.3, 0.05])))"
    zero, one = (json.loads(output.splitlines()[-1]) for output in run_pair(program))
    assert zero.pop("asked") > 8 and one.pop("asked") == 0
    assert zero == one and zero["appended"] > 20
    assert converse([None])["tokens"] == zero["tokens"]  # one process, and nobody waits


def asked_for(rows):
    """Returns an `Answers` with a pending request for each row, and its futures."""
    futures = {row: concurrent.futures.Future() for row in rows}
    asked = Answers(lambda place, tokens: futures[place[2]])
    ended = {row: ((0, 0, row), np.zeros(1, np.int32)) for row in rows}
    assert asked.gather(ended, wait=False) == {} and asked.waiting == set(rows)
    return asked, futures


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_answers_in_time_are_taken_together_whatever_their_order(monkeypatch, wait, order):
    monkeypatch.setattr(answers, "GRACE", 60.0)
    asked, futures = asked_for(range(3))
    for place, row in enumerate(order):
        threading.Timer(0.02 * place, futures[row].set_result, [[row]]).start()
    assert list(asked.gather({}, wait).items()) == [(0, [0]), (1, [1]), (2, [2])]
    assert not asked.waiting


def test_late_answers_hold_nobody_up_twice(monkeypatch):
    monkeypatch.setattr(answers, "GRACE", 0.01)
    asked, futures = asked_for(range(2))
    futures[1].set_result([1])
    assert asked.gather({}, wait=False) == {1: [1]}
    monkeypatch.setattr(answers, "GRACE", 1e6)  # would never return
    assert asked.gather({}, wait=False) == {} and asked.waiting == {0}
    futures[0].set_result([0])
    assert asked.gather({}, wait=True) == {0: [0]}
