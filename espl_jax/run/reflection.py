"""Opens the reflector of a run, and overlaps remote reflection with work on the device."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from espl_jax.parallel import processes
from espl_jax.pretrained.load import Pretrained
from espl_jax.reflectors.journal import Journal
from espl_jax.reflectors.local import local_reflector
from espl_jax.reflectors.openai import OpenAIReflector
from espl_jax.reflectors.openai_server import OpenAIServer
from espl_jax.reflectors.replay import ReplayReflector, Transcripts
from espl_jax.rollouts.keys import stream_key
from espl_jax.run.config import Config
from espl_jax.run.parts import Parts
from espl_jax.sampling.settings import Sampling
from espl_jax.storage.folders import AnyPath
from espl_jax.types import Conversation, Reflect

MakeReflect = Callable[[Pretrained, int], Reflect]
"""(current policy, iteration) -> the reflector of that iteration."""


@contextlib.contextmanager
def open_reflectors(config: Config, parts: Parts, workdir: AnyPath) -> Iterator[MakeReflect]:
    """Yields the function that makes the reflector of each iteration.

    Replies of a server are written to `replies.jsonl` in the work directory as they arrive, so a resumed run
    repeats no request. With several processes, only the first queries a server or replays; see `Beside`.

    Args:
      config: the run's configuration.
      parts: the parts of the run.
      workdir: the run's work directory.

    Raises:
      ValueError: for an unusable field of `reflection`, which the message names.
    """
    r = config.reflection
    if r.reflector == "local" or not parts.evolves:
        arguments = json.loads(r.chat_template_kwargs) if parts.reflector else parts.chat.template_arguments

        def on_device(policy: Pretrained, iteration: int) -> Reflect:
            return local_reflector(
                parts.reflector or (policy if r.policy == "current" else parts.reference),
                key=stream_key(config.seed, "reflection", iteration),
                sampling=Sampling(
                    max_new_tokens=r.max_new_tokens,
                    temperature=r.temperature,
                    draft_tokens=config.sampling.draft_tokens,
                ),
                max_input_tokens=r.max_input_tokens,
                reasoning_tokens=r.reasoning_tokens,
                template_arguments=arguments,
                capacity=parts.capacity,
            )

        yield on_device
        return
    with contextlib.ExitStack() as stack:
        yield processes.only_first(lambda: stack.enter_context(_elsewhere(r, workdir))) or _not_here


@contextlib.contextmanager
def _elsewhere(r: Any, workdir: AnyPath) -> Iterator[MakeReflect]:
    """Yields the function that makes reflectors which use a server or a log."""
    if r.reflector == "replay":
        transcripts = Transcripts(r.replay)
        yield lambda policy, iteration: ReplayReflector(transcripts, iteration=iteration)
        return
    server = OpenAIServer(
        base_url=r.base_url,
        model=r.model,
        api_key_variable=r.api_key_variable,
        concurrency=r.concurrency,
        timeout=r.timeout,
        max_retries=r.max_retries,
        temperature=r.temperature,
        max_new_tokens=r.max_new_tokens,
        price_input=r.price_input,
        price_output=r.price_output,
    )
    with Journal(workdir / "replies.jsonl") as journal:
        yield lambda policy, iteration: OpenAIReflector(server, iteration=iteration, journal=journal)


def _not_here(policy: Pretrained, iteration: int) -> Reflect:
    """Stands in for `_elsewhere` on all processes but the first, which shares its results."""

    def reflect(conversations: Sequence[Conversation]) -> list[str | None]:
        raise RuntimeError("only the first process reflects")

    return reflect


class Beside:
    """Runs a function in a background thread, concurrently with this thread until `result` is called.

    With several processes, the first one runs the function and `result` returns its value in all of them. The
    function must not use devices.

    Attributes:
      seconds: duration of the function, once it has finished.
      waited: seconds that `result` spent waiting.
    """

    def __init__(self, function: Callable[[], Any]):
        self.seconds = self.waited = 0.0
        self._function = function
        self._outcome: tuple[Any, BaseException | None] | None = None
        # A daemon, so that a run that fails does not wait for a slow server.
        self._thread = threading.Thread(target=self._run, name="reflection", daemon=True)
        if processes.is_first():
            self._thread.start()

    def _run(self) -> None:
        start = time.monotonic()
        try:
            self._outcome = self._function(), None
        except BaseException as error:
            self._outcome = None, error
        self.seconds = time.monotonic() - start

    def result(self) -> Any:
        """Returns the result of the function, or raises its exception."""
        return processes.decide(self._wait)

    def _wait(self) -> Any:
        start = time.monotonic()
        self._thread.join()
        self.waited = time.monotonic() - start
        assert self._outcome is not None
        value, error = self._outcome
        if error is not None:
            raise error
        return value

    def times(self) -> dict[str, float]:
        """Returns the total seconds of reflection, and the part that overlapped with other work."""
        return {"reflection_total": self.seconds, "reflection_hidden": max(0.0, self.seconds - self.waited)}
