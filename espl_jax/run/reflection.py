"""Who reflects in a run, and how reflection elsewhere runs beside the work of the device."""

from __future__ import annotations

import contextlib
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
"""The policy now and the iteration; the reflector of that iteration."""


@contextlib.contextmanager
def open_reflectors(config: Config, parts: Parts, workdir: AnyPath) -> Iterator[MakeReflect]:
    """Gives the function that makes the reflector of each iteration.

    Replies of a server are kept in `replies.jsonl` of the work directory as they arrive, so that a resumed
    run asks nothing twice. Of several processes the first one alone asks a server or replays, see `Beside`.

    Args:
      config: of the run.
      parts: of the run.
      workdir: of the run.

    Raises:
      ValueError: naming the field of `reflection` that cannot be used.
    """
    r = config.reflection
    if r.reflector == "local" or not parts.evolves:

        def on_device(policy: Pretrained, iteration: int) -> Reflect:
            return local_reflector(
                policy if r.policy == "current" else parts.reference,
                key=stream_key(config.seed, "reflection", iteration),
                sampling=Sampling(max_new_tokens=r.max_new_tokens, temperature=r.temperature),
                max_input_tokens=r.max_input_tokens,
                template_arguments=parts.chat.template_arguments,
                capacity=parts.capacity,
            )

        yield on_device
        return
    with contextlib.ExitStack() as stack:
        yield processes.only_first(lambda: stack.enter_context(_elsewhere(r, workdir))) or _not_here


@contextlib.contextmanager
def _elsewhere(r: Any, workdir: AnyPath) -> Iterator[MakeReflect]:
    """Reflection by a server, or from a record."""
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
    """In the place of `_elsewhere` on the processes that are told what came of it."""

    def reflect(conversations: Sequence[Conversation]) -> list[str | None]:
        raise RuntimeError("only the first process reflects")

    return reflect


class Beside:
    """Runs a function in a thread of its own, beside whatever this thread does until it wants the result.

    Of several processes the first one runs it, and `result` gives it to all: the function must not use
    devices.

    Attributes:
      seconds: that the function took, once it is done.
      waited: seconds of these that `result` had to wait for.
    """

    def __init__(self, function: Callable[[], Any]):
        self.seconds = self.waited = 0.0
        self._function = function
        self._outcome: tuple[Any, BaseException | None] | None = None
        # A daemon: a run that ends for another reason does not wait for a slow server.
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
        """What the function returned, or its exception."""
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
        """Seconds of the whole, and of the part that other work hid."""
        return {"reflection_total": self.seconds, "reflection_hidden": max(0.0, self.seconds - self.waited)}
