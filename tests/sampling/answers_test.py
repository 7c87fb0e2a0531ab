"""Conversations in two processes: the first one alone asks, and both hold the same."""

import concurrent.futures
import hashlib
import json
import threading

import jax
import numpy as np

from espl_jax import sharding
from espl_jax.models import transformer
from espl_jax.sampling import draw
from espl_jax.sampling.generate import sample_tree
from tests import tiny
from tests.two_processes import run_pair

CONFIG = tiny.CONFIG.replace(num_layers=1, num_heads=1, num_kv_heads=1)
STOPS = tuple(range(0, 61, 3))


def converse(delays):
    """Samples rows whose turns are answered after so many seconds, and returns all that was said."""
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
    params = sharding.place(tiny.params(CONFIG), transformer.abstract(CONFIG), mesh)
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


def test_two_processes_hold_the_same_conversations():
    program = "import json\nfrom tests.sampling.answers_test import converse\n"
    program += "print(json.dumps(converse([0.0, None, 0.3, 0.05])))"
    zero, one = (json.loads(output.splitlines()[-1]) for output in run_pair(program))
    assert zero.pop("asked") > 8 and one.pop("asked") == 0
    assert zero == one and zero["appended"] > 20
    assert converse([None])["tokens"] == zero["tokens"]  # one process, and nobody waits
