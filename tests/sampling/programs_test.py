"""The programs listed for a `sample_tree` call are those that it runs, and compiled ahead they are found."""

import itertools
import re

import jax
import numpy as np
import pytest

from espl_jax.models.params import abstract
from espl_jax.parallel import ahead, sharding
from espl_jax.sampling import decode, draw, programs, scheduler, sizes
from espl_jax.sampling.programs import Shapes
from espl_jax.sampling.settings import Sampling
from espl_jax.sampling.sizes import Sizes
from espl_jax.sampling.truncation import Truncation
from tests.support import tiny
from tests.support.compiled_ahead import LISTED, Waiting
from tests.support.flat import sample_tree

SMALL = tiny.CONFIG.replace(num_layers=1, num_heads=1, num_kv_heads=1, max_positions=1024)


def sample(programs_ahead=ahead.OFF, params=None, config=SMALL, **settings):
    systems, problems = [[5, 6, 7, 8], [9, 4]], [[[9, 10], [11, 12, 13]], [[12, 13, 14], [15]]]
    keys = draw.row_keys(jax.random.key(0, impl="threefry2x32"), *np.ogrid[0:2, 0:2, 0:2])
    settings = {"max_new_tokens": 40, "max_rows": 1, "chunk": 8, "stop_ids": (3,)} | settings
    params = tiny.params(config) if params is None else params
    return sample_tree(params, config, systems, problems, keys, ahead=programs_ahead, **settings)


def assert_all_found(caplog, params=None, config=SMALL, **settings):
    """Samples with all programs compiled ahead; returns the samples and the names of the functions called."""
    jax.clear_caches()
    with Waiting() as programs_ahead, jax.log_compiles(), caplog.at_level("WARNING"):
        caplog.clear()
        samples = sample(programs_ahead, params, config, **settings)
    assert len(programs_ahead.shapes) == len(programs_ahead.listed)
    assert programs_ahead.called.keys() <= programs_ahead.shapes
    # The compilations that this thread logs are those of other, small functions.
    compiled = set(re.findall(r"Compiling jit\((\w+)\)", caplog.text))
    assert compiled and compiled.isdisjoint(LISTED)
    again = sample(ahead.OFF, params, config, **settings)
    for ours, theirs in zip(samples, again, strict=True):
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs)
    return samples, {key[0].__name__ for key in programs_ahead.called}


def test_rollouts(caplog):
    samples, called = assert_all_found(caplog, truncation=Truncation(top_k=5))
    assert called == {"prefill", "admit", "move", "decode_chunk"} and samples.truncated.any()


@pytest.mark.slow
def test_weights_committed_to_a_device(caplog):
    """As a checkpoint is restored. Greedy, in the layout for CPUs."""
    params = jax.device_put(tiny.params(SMALL), jax.devices()[0])
    config = SMALL.replace(sampling_layout="unstacked")
    _, called = assert_all_found(caplog, params, config, temperature=0.0)
    assert called >= {"prefill", "admit", "decode_chunk"}


def answer(place, tokens):
    return [7] * 40 if len(tokens) < 30 else None


def test_turns(caplog):
    _, called = assert_all_found(caplog, max_new_tokens=60, respond=answer)
    assert called >= {"admit", "extend", "decode_chunk"}


@pytest.mark.slow
def test_stages(caplog, monkeypatch):
    """A column takes 48 bytes and an empty slot 732; rows outgrow the first stage and are prefilled again."""
    for module in (scheduler, sizes, programs):
        monkeypatch.setattr(module, "EXTENDED_TOKENS", 64)
    monkeypatch.setattr(sizes, "EXTENDED_COLUMNS", 0)
    monkeypatch.setattr(sizes, "TPU_LANES", 64)
    monkeypatch.setattr(sizes, "device_memory", lambda: 42_000)
    few = {"max_new_tokens": 170, "max_rows": None, "held_bytes": 0, "stop_ids": ()}
    _, called = assert_all_found(caplog, **few)
    assert called >= {"admit", "extend", "decode_chunk"}


def test_eight_devices(caplog):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    config = tiny.CONFIG.replace(num_layers=1)
    params = sharding.place(tiny.params(config), abstract(config), mesh, "sampling")
    _, called = assert_all_found(caplog, params, config, max_rows=4, mesh=mesh)
    assert called >= {"prefill", "admit", "decode_chunk"}


def shapes_of(stages, **changes):
    """Three lanes of twelve rows."""
    tree = {"lanes": 3, "problems": 4, "rows": 36, "system": 64, "problem": 200}
    given = tree | {"params": {}, "decoder": SMALL, "sampling": Sampling(max_new_tokens=400)} | changes
    return Shapes(stages=stages, **given)


def chunks(stages, **changes):
    """The chunks in the order in which they are compiled: (slots, rows, columns, aligned)."""
    found = sorted(programs.every_call(shapes_of(stages, **changes)), key=lambda call: call.urgency)
    found = [call for call in found if call.function is decode.decode_chunk]
    return [
        (c.arguments[3][0].shape[2], len(c.arguments[4].token), c.static["columns"], c.static["aligned"])
        for c in found
    ]


def test_order():
    """The widest chunks first, from the columns of a problem on; then narrower ones, for rows that end at
    different lengths; then the unlikely."""
    stage = Sizes(1, 36, 640, 512, 256, 16)
    assert stage.columns == [128, 256, 384, 512] and stage.widths[-4:] == [14, 18, 27, 36]
    found = chunks([stage])
    assert found[:3] == [(36, 36, columns, True) for columns in (256, 384, 512)]
    narrow = found[3 : 3 * len(stage.widths)]
    assert {x[1:3] for x in narrow} == set(itertools.product(stage.widths[:-1], (256, 384, 512)))
    assert [x[1:3] for x in narrow[:3]] == [(18, 256), (9, 384), (1, 512)] and not any(x[3] for x in narrow)
    assert narrow[-1][1:3] == (1, 256)
    # Problems are shorter; or rows are not ordered by lane, as long as none has ended and all have slots.
    other = {(36, 36, columns, False) for columns in stage.columns}
    other |= {(36, rows, 128, rows == 36) for rows in stage.widths}
    assert set(found[3 * len(stage.widths) :]) == other and len(found) == len(set(found))
    # More rows than slots: the next one is of any lane.
    queued = chunks([stage], rows=72)
    assert not queued[0][3] and {x[:3] for x in queued} == {x[:3] for x in found}
    assert all(aligned for *_, aligned in chunks([stage], lanes=1))


def test_order_of_stages():
    """Rows have outgrown the stage before, except for those that return after they waited for an answer."""
    stages = [Sizes(1, 36, 640, 512, 256, 16), Sizes(1, 18, 1152, 1024, 256, 16)]
    first, second = ([x for x in chunks(stages) if x[0] == slots] for slots in (36, 18))
    assert chunks(stages) == first + second and first == chunks(stages[:1])
    assert second[:2] == [(18, 18, columns, False) for columns in (512, 768)]
    assert {columns for _, _, columns, _ in second} == {512, 768, 1024}
    waited = [x for x in chunks(stages, turns=True) if x[0] == 18]
    assert {columns for _, _, columns, _ in waited} == set(stages[1].columns)


def test_prompts_of_another_length_have_programs_of_their_own(monkeypatch):
    """They are queued at the start of the first rollouts that have such prompts."""
    monkeypatch.setattr(ahead.ThreadPoolExecutor, "submit", lambda *_: None)
    stage = Sizes(1, 36, 640, 512, 256, 16)
    with ahead.CompileAhead(1) as programs_ahead:

        def queued(**changes):
            return programs_ahead.add("Rollouts", programs.every_call(shapes_of([stage], **changes)))

        count = queued()
        assert queued() == 0
        # Rows are admitted and moved as before.
        assert queued(system=128) == count - len(stage.problem_widths) - 1
        assert queued(problem=100) == queued(system=128) == 0


def test_description():
    stage = Sizes(1, 36, 640, 512, 256, 16)
    # The prompts; every width of problems, to prefill and to admit; moves; chunks, the widest ones twice.
    count = 1 + 2 * 4 + 1 + (len(stage.widths) + 1) * 4
    assert programs.describe(shapes_of([stage])).endswith(
        f" columns; {count} programs for each bucket of system prompts"
    )
