"""Compiles all listed programs before the run goes on, and remembers what was listed and what was called."""

import collections
import threading

from espl_jax.parallel import ahead

LISTED = {"prefill", "admit", "move", "extend", "decode_chunk", "policy_gradient_step", "batch_logprobs"}
"""Names of the jitted functions that are compiled ahead."""


class Waiting(ahead.CompileAhead):
    """Attributes:
    listed: calls compiled ahead.
    called: number of calls, by `ahead._shapes`.
    """

    def __init__(self, threads=1, finished=lambda *_: None):
        self.listed, self.called, self._done = [], collections.Counter(), threading.Event()

        def done(*line):
            finished(*line)
            self._done.set()

        super().__init__(threads, done)

    def add(self, title, calls):
        calls = list(calls)
        self._done.clear()
        if count := super().add(title, calls):
            self.listed += calls
            assert self._done.wait(300)
        return count

    def call(self, function, *arguments, **static):
        self.called[ahead._shapes(function, arguments, static)] += 1
        return super().call(function, *arguments, **static)

    @property
    def shapes(self):
        """What `called` has for the calls that were listed."""
        return {ahead._shapes(call.function, call.arguments, call.static) for call in self.listed}
