from concurrent.futures import Future

import pytest

from espl_jax.environments.grading.cached import CachedWorkers
from espl_jax.environments.grading.workers import Verdict


class Counting:
    """Workers that answer at once, and remember what they were asked."""

    def __init__(self, error=None):
        self.asked, self.error, self.closed = [], error, 0

    def submit(self, *question):
        self.asked.append(question)
        future = Future()
        if self.error:
            future.set_exception(self.error)
        else:
            future.set_result(Verdict(False, question[2], "timeout"))
        return future

    def close(self):
        self.closed += 1


def test_the_same_question_is_asked_once_even_if_it_timed_out():
    workers = Counting()
    cached = CachedWorkers(workers)
    first = cached.submit("boxed", "1", "2")
    assert cached.submit("boxed", "1", "2") is first
    for other in (("expression", "1", "2"), ("boxed", "2", "1"), ("boxed", "12", "")):
        cached.submit(*other)
    assert len(workers.asked) == 4


def test_what_was_not_asked_for_longest_is_forgotten():
    workers = Counting()
    cached = CachedWorkers(workers, entries=2)
    for answer in ("a", "b", "a", "c", "a", "b"):
        cached.submit("boxed", "1", answer)
    assert [answer for *_, answer in workers.asked] == ["a", "b", "c", "b"]


def test_errors_are_not_remembered_and_close_forgets():
    workers = Counting(error=RuntimeError("no process"))
    cached = CachedWorkers(workers)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no process"):
            cached.submit("boxed", "1", "2").result()
    workers.error = None
    cached.submit("boxed", "1", "2")
    cached.close()
    cached.submit("boxed", "1", "2")
    assert len(workers.asked) == 4 and workers.closed == 1
