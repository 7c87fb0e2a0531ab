"""Programs compiled in the background: who waits for whom, and what an error or the end of a run does."""

import functools
import logging
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.parallel import ahead
from espl_jax.parallel.ahead import Call, CompileAhead

VECTOR = jax.ShapeDtypeStruct((3,), jnp.float32)


class Slow:
    """A function that takes until `go` to compile, in the background or when it is called first."""

    def __init__(self, error=None):
        self.begun, self.go = threading.Event(), threading.Event()
        self.compiled, self.error = [], error

    def _compile(self):
        if not self.compiled:
            self.begun.set()
            assert self.go.wait(30)
            if self.error:
                raise self.error
            self.compiled.append(threading.current_thread().name)

    def lower(self, *arguments, **static):
        return self

    def compile(self):
        self._compile()

    def __call__(self, x):
        self._compile()
        return x + 1


def listed(function, *arguments, **settings):
    return Call(function, arguments or (VECTOR,), {}, **settings)


@pytest.fixture
def finished():
    """Gets what `CompileAhead` says, and an event for it."""
    said, event = [], threading.Event()

    def say(*line):
        said.append(line)
        event.set()

    say.lines, say.wait = said, lambda: event.wait(30)
    return say


def in_thread(function, *arguments):
    """Calls in another thread; returns the thread and a list that gets the result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    return thread, results


def test_a_later_call_finds_the_program(finished, caplog):
    @functools.partial(jax.jit, static_argnames="steps", donate_argnames="y")
    def unlike_any_other(tree, y, *, steps):
        return y + sum(jax.tree.leaves(tree)) * steps

    held = {"a": jnp.ones(3), "b": np.ones(3, np.float32)}
    shapes = ({name: jax.ShapeDtypeStruct((3,), jnp.float32) for name in held}, VECTOR)
    with jax.log_compiles(), caplog.at_level(logging.WARNING), CompileAhead(1, finished) as programs:
        assert programs.add("Some", [Call(unlike_any_other, shapes, {"steps": n}) for n in (2, 3, 2)]) == 2
        assert programs.add("Again", [Call(unlike_any_other, shapes, {"steps": 3})]) == 0
        assert finished.wait()
        for steps in (2, 3):
            out = programs.call(unlike_any_other, held, jnp.zeros(3), steps=steps)
            np.testing.assert_array_equal(out, np.full(3, 2.0 * steps))
        assert "Compiling jit(unlike_any_other)" not in caplog.text
        programs.call(unlike_any_other, held, jnp.zeros(3), steps=4)
        assert len(re.findall(r"Compiling jit\(unlike_any_other\)", caplog.text)) == 1
    assert [(title, count) for title, count, _ in finished.lines] == [("Some", 2)]


def test_a_call_waits_for_a_program_that_is_being_compiled(finished):
    slow = Slow()
    with CompileAhead(1, finished) as programs:
        programs.add("Some", [listed(slow)])
        assert slow.begun.wait(30)
        thread, results = in_thread(programs.call, slow, np.zeros(3, np.float32))
        time.sleep(0.05)
        assert thread.is_alive()
        slow.go.set()
        thread.join(30)
        np.testing.assert_array_equal(results[0], np.ones(3))
        (compiled_by,) = slow.compiled
        assert compiled_by.startswith("compile-ahead")


def test_a_call_compiles_what_is_only_queued_and_the_thread_does_not_do_it_again(finished):
    first, queued = Slow(), Slow()
    queued.go.set()
    with CompileAhead(1, finished) as programs:
        programs.add("Some", [listed(first), listed(queued)])
        assert first.begun.wait(30)
        programs.call(queued, np.zeros(3, np.float32))
        assert queued.compiled == [threading.current_thread().name]
        first.go.set()
        assert finished.wait()
    assert len(queued.compiled) == 1


def test_the_urgent_first(finished):
    seen, first = [], Slow()

    def entry(name, urgency):
        slow = Slow()
        slow.compile = lambda: seen.append(name)
        return listed(slow, urgency=urgency)

    with CompileAhead(1, finished) as programs:
        programs.add("Update", [listed(first)])
        assert first.begun.wait(30)
        programs.add("Rollouts", [entry("c", 2), entry("a", 0), entry("d", 2)])
        programs.add("Update", [entry("b", 1)])
        first.go.set()
        while len(seen) < 4:
            finished.wait()
            time.sleep(0.01)
    assert seen == list("abcd")


def test_an_error_is_logged_once_and_every_call_still_runs(caplog):
    failing, later, other = Slow(ValueError("no such lowering")), Slow(), Slow()
    for slow in (failing, later, other):
        slow.go.set()
    with caplog.at_level(logging.WARNING), CompileAhead(1) as programs:
        programs.add("Some", [listed(failing), listed(later)])
        while not programs._ended:
            time.sleep(0.01)
        failing.error = None
        for slow in (failing, later):
            np.testing.assert_array_equal(programs.call(slow, np.zeros(3)), np.ones(3))
            assert slow.compiled == [threading.current_thread().name]
        assert programs.add("Some", [listed(other)]) == 0
    (record,) = caplog.records
    assert "compile_ahead: ValueError: no such lowering; the run compiles its programs" in record.getMessage()


@pytest.mark.parametrize("error", [None, ValueError])
def test_the_end_of_a_run_begins_no_further_program(finished, error):
    """And neither waits for the one that is being compiled nor hides an error."""
    slow, later = Slow(), Slow()

    def run():
        with CompileAhead(1, finished) as programs:
            programs.add("Some", [listed(slow), listed(later)])
            assert slow.begun.wait(30)
            (thread,) = (t for t in threading.enumerate() if t.name.startswith("compile-ahead"))
            if error:
                raise error("of the run")
            return thread

    if error:
        with pytest.raises(error, match="of the run"):
            run()
        slow.go.set()
    else:
        thread = run()
        slow.go.set()
        thread.join(30)
        assert not thread.is_alive()
    time.sleep(0.05)
    assert not later.begun.is_set() and not finished.lines


def test_threads(monkeypatch):
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 200)
    assert [ahead.threads_for(choice) for choice in ("off", "auto", "on")] == [0, 0, 8]
    monkeypatch.setattr(ahead.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 2)
    assert [ahead.threads_for(choice) for choice in ("off", "auto", "on")] == [0, 1, 1]


def test_off_lists_nothing():
    def calls():
        raise AssertionError("not needed")
        yield

    assert ahead.OFF.add("Some", calls()) == 0 and not ahead.OFF.on
    assert ahead.OFF.call(lambda x, *, y: x + y, 1, y=2) == 3
