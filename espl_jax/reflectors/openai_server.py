"""Any OpenAI-compatible server: OpenAI's own, vLLM, llama.cpp, `transformers serve` and many more."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import re
import time
import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import openai
import tenacity
from absl import logging

from espl_jax.evolution.schemas import relaxed
from espl_jax.text.thinking import strip_thinking
from espl_jax.types import Conversation, Schema

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

FINAL = ("refused", "length", "filtered")
"""Failures that a further attempt would most likely meet again: a 4xx other than the ones below, e.g. for a
conversation too long for the server; all of `max_new_tokens` spent on reasoning; a reply withheld or cut by a
filter."""

FAILURES = ("timeout", "connection", "rate_limit", "server_error", "body", *FINAL, "not_asked")
"""Why a reply may be missing: the time limit; no connection, or a broken one; 429; 408, 409, 5xx, or a reply
that the server says it broke off; a body that holds no reply; `FINAL`; the server had failed so often before
that it was left alone."""

# What servers give as `finish_reason`, in lower case and with "_" for "-". A reply with a reason that is not
# listed may be cut anywhere.
_FILTERED = (
    "content_filter",
    "safety",
    "recitation",
    "prohibited_content",
    "blocklist",
    "spii",
    "refusal",
    "sensitive",
)
_OUT_OF_TOKENS = ("length", "max_tokens", "model_length")
_ENDED = ("", "stop", "eos", "eos_token", "end_turn", "stop_sequence")
_CALLING = ("tool_calls", "function_call", "tool_use")

# What a server may refuse of a request: what its message then says, and the name under which the part is sent
# again, or None for a request without it.
_OPTIONAL = {
    "response_format": (re.compile("response_format|json_schema|structured.outputs?|grammar|guided"), None),
    "max_tokens": (re.compile("max_tokens"), "max_completion_tokens"),
    "temperature": (re.compile("temperature"), None),
}
# Answers that every further request would get, and what mends them.
_STOPPING = {
    401: "put a valid key into that variable",
    402: "add funds to the account of that key",
    403: "use a key that may ask this model, or another model",
    404: "correct reflection.base_url (most end in /v1) or reflection.model",
    405: "correct reflection.base_url (most end in /v1)",
}


class OpenAIServer:
    """A server and how it is asked; one for a run, since it learns which parts of a request are refused.

    If the server's message to an error names `response_format`, `temperature` or `max_tokens`, the request is
    sent again without it, or with `max_completion_tokens`. Once such a request was answered, later ones go
    that way from the start. What was learnt is known to this process alone and enters neither the keys nor
    the counts of a journal, so a resumed run learns it anew and takes the same course.

    Args:
      base_url: the address that `/chat/completions` is added to.
      model: its name for the server.
      temperature: of sampling.
      max_new_tokens: of each reply, thinking included.
      concurrency: most conversations in flight at once, those that wait for a retry included.
      timeout: seconds that one attempt may take, whatever the server does meanwhile. A server that answers
        one request after the other needs `concurrency` times the seconds of one.
      max_retries: further attempts at a conversation, after any of `FAILURES` but `FINAL`.
      api_key_variable: the environment variable with the key. Where it is not set, a placeholder is sent,
        which servers without keys take.
      price_input, price_output: of a million tokens, in any currency.
      first_wait: seconds before the first retry, doubled with each, plus up to as much by chance.
      longest_wait: seconds that such a wait, or one that the server asks for, lasts at most.

    Raises:
      ValueError: naming the field of the configuration, its value and the fix.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        temperature: float,
        max_new_tokens: int,
        concurrency: int,
        timeout: float,
        max_retries: int,
        api_key_variable: str = "OPENAI_API_KEY",
        price_input: float = 0.0,
        price_output: float = 0.0,
        first_wait: float = 1.0,
        longest_wait: float = 120.0,
    ):
        _check(base_url, model, concurrency, timeout, max_retries, price_input, price_output)
        self.base_url, self.model = base_url, model
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.price_input, self.price_output = price_input, price_output
        self._api_key_variable, self._api_key = api_key_variable, _read_api_key(api_key_variable)
        self._longest_wait = longest_wait
        doubled = tenacity.wait_exponential(multiplier=first_wait, max=longest_wait)
        self._backoff = doubled + tenacity.wait_random(0, first_wait)
        self._refused: frozenset[str] = frozenset()

    def client(self) -> openai.AsyncOpenAI:
        """A client for one event loop. Retries and time limits are not its business."""
        key = self._api_key or "none"
        return openai.AsyncOpenAI(base_url=self.base_url, api_key=key, max_retries=0, timeout=None)

    async def ask(
        self, client: openai.AsyncOpenAI, conversation: Conversation, schema: Schema | None
    ) -> dict[str, Any]:
        """Asks one conversation until there is a reply or no hope of one.

        Returns:
          Plain JSON values: `reply`, without thinking blocks, or None; `cut_off`, whether the limit of tokens
          ended it; `failure`, one of `FAILURES` or None;
          `said`, what was heard instead of a reply; `retries`; `usage`, `prompt_tokens` and
          `completion_tokens` of all attempts, as far as the server told them.

        Raises:
          RuntimeError: an answer that every request would get: wrong key, model or address, no funds.
        """
        parts: dict[str, Any] = {"max_tokens": self.max_new_tokens, "temperature": self.temperature}
        if schema is not None:
            form = {"name": "edits", "schema": relaxed(schema), "strict": True}
            parts["response_format"] = {"type": "json_schema", "json_schema": form}
        refused = set(self._refused)
        usage = {"prompt_tokens": 0, "completion_tokens": 0}
        outcome = {
            "reply": None,
            "cut_off": False,
            "failure": None,
            "said": None,
            "retries": 0,
            "usage": usage,
        }
        try:
            async for attempt in tenacity.AsyncRetrying(
                stop=tenacity.stop_after_attempt(self.max_retries + 1),
                wait=self._wait,
                retry=tenacity.retry_if_exception(_may_pass),
                reraise=True,
            ):
                outcome["retries"] = attempt.retry_state.attempt_number - 1
                with attempt:
                    body = await self._attempt(client, conversation, parts, refused)
                    outcome["reply"], outcome["cut_off"] = _read_reply(body, usage)
        except _Failure as failure:
            outcome |= {"failure": failure.reason, "said": self._quote(failure.said)}
        return outcome

    async def _attempt(
        self, client: openai.AsyncOpenAI, conversation: Conversation, parts: dict[str, Any], refused: set[str]
    ) -> bytes:
        """The body of an answer; adds to `refused` what the server does not take of `parts`."""
        while True:
            sent = {name: part for name, part in parts.items() if name not in refused}
            other_names = {_OPTIONAL[name][1]: name for name in refused & parts.keys()}
            sent |= {other: parts[name] for other, name in other_names.items() if other}
            messages = cast("list[ChatCompletionMessageParam]", conversation)
            try:
                async with asyncio.timeout(self.timeout):
                    answer = await client.chat.completions.with_raw_response.create(
                        model=self.model, messages=messages, **sent
                    )
            except TimeoutError:
                raise _Failure("timeout", f"no whole answer within {self.timeout:g} seconds") from None
            except openai.APIConnectionError as error:
                raise _Failure("connection", repr(error.__cause__ or error)) from None
            except openai.APIStatusError as error:
                part = _refused_part(error, sent)
                if part is None:
                    raise self._failure(error) from None
                refused.add(part)
                continue
            for part in refused - self._refused:
                logging.warning("%s refuses %s, which is not sent from now on", self.base_url, part)
            self._refused |= refused
            return answer.content

    def _failure(self, error: openai.APIStatusError) -> Exception:
        """What an error's status means: this attempt's failure, or the end of the run."""
        status, said = error.status_code, error.response.text
        # OpenAI says with the status of a rate limit that there is no money left.
        kind = 402 if status == 429 and "insufficient_quota" in said else status
        if kind in _STOPPING:
            is_set = "set" if self._api_key else "not set"
            return RuntimeError(
                f"reflection.base_url={self.base_url} answered {status} to a request for "
                f"reflection.model={self.model}: {self._quote(said) or '(nothing more)'}\n"
                f"To mend it, {_STOPPING[kind]}. The key is read from the environment variable of "
                f"reflection.api_key_variable={self._api_key_variable!r}, which is {is_set}. Replies that "
                "had arrived are kept; the same command goes on from them."
            )
        if status == 429:
            return _Failure("rate_limit", said, _retry_after(error.response.headers))
        if status in (408, 409) or status >= 500:
            return _Failure("server_error", f"{status}: {said}", _retry_after(error.response.headers))
        return _Failure("refused", f"{status}: {said}")

    def _wait(self, state: tenacity.RetryCallState) -> float:
        failure = state.outcome and state.outcome.exception()
        assert isinstance(failure, _Failure)  # see `_may_pass`
        return min(failure.retry_after, self._longest_wait) + self._backoff(state)

    def _quote(self, said: str) -> str:
        """What a server said, cut, and without the key that it may have repeated."""
        said = said.replace(self._api_key, "[key]") if self._api_key else said
        return " ".join(said.split())[:500]


class _Failure(Exception):
    """An attempt without a reply: one of `FAILURES`, what was heard, seconds that the server asks for."""

    def __init__(self, reason: str, said: str, retry_after: float = 0.0):
        super().__init__(reason)
        self.reason, self.said, self.retry_after = reason, said, retry_after


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, _Failure) and error.reason not in FINAL


def _refused_part(error: openai.APIStatusError, sent: Mapping[str, Any]) -> str | None:
    """The part of the request that the server's message is about, or None if it is about something else."""
    if error.status_code in (401, 402, 403, 408, 409, 429):
        return None
    said = error.response.text.lower()
    return next((part for part, (says, _) in _OPTIONAL.items() if part in sent and says.search(said)), None)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, as a number or as a date (RFC 9110, section 10.2.3); else 0."""
    told = headers.get("retry-after", "")
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _read_reply(body: bytes, usage: dict[str, int]) -> tuple[str, bool]:
    """The text of an answer, without thinking blocks, and whether the limit of tokens cut it off; adds its
    tokens to `usage`.

    Raises:
      _Failure: for a body without a reply, or with one that the server did not finish or reports an error
        beside.
    """
    said = body.decode(errors="replace")
    try:
        answer = json.loads(said)
    except (ValueError, RecursionError):
        raise _Failure("body", f"no JSON: {said}") from None
    told = answer.get("usage") if isinstance(answer, dict) else None
    if isinstance(told, dict):
        for name in usage:
            usage[name] += told[name] if isinstance(told.get(name), int) else 0
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        content = refusal = finish = None
        choice = {}
    finish = finish.strip().lower().replace("-", "_") if isinstance(finish, str) else ""
    if finish in _FILTERED:
        raise _Failure("filtered", f"finish_reason={finish}: {said}")
    if finish not in (*_ENDED, *_OUT_OF_TOKENS, *_CALLING):
        raise _Failure("server_error", f"finish_reason={finish}: {said}")
    if choice and (answer.get("error") or choice.get("error")):
        raise _Failure("server_error", f"an error beside the reply: {said}")
    if isinstance(content, list):  # some servers give a thinking model's reply in parts
        texts = (
            part.get("text", "") for part in content if isinstance(part, dict) and part.get("type") == "text"
        )
        content = "".join(map(str, texts))
    # JSON can hold half a surrogate pair, which no file and no further request can.
    reply = strip_thinking(content.encode(errors="replace").decode()) if isinstance(content, str) else ""
    if reply.strip():
        return reply, finish in _OUT_OF_TOKENS
    if isinstance(refusal, str) and refusal:
        raise _Failure("filtered", f"refusal: {refusal}")
    if finish in _OUT_OF_TOKENS:
        raise _Failure("length", "no tokens were left for a reply; raise reflection.max_new_tokens")
    if not isinstance(content, str) or finish not in _ENDED:
        raise _Failure("body", f"no reply in it: {said}")
    return reply, False


def _read_api_key(variable: str) -> str:
    """The key, or "" where there is none. Raises ValueError, which must not quote what may be a key."""
    if variable and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", variable):
        raise ValueError(
            "reflection.api_key_variable is not the name of an environment variable: put the key into a "
            "variable, and its name, e.g. OPENAI_API_KEY, here"
        )
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"reflection.api_key_variable={variable!r}: the value of that variable has characters that no "
            "key has; set it anew"
        )
    return key


def _check(
    base_url: str,
    model: str,
    concurrency: int,
    timeout: float,
    max_retries: int,
    price_input: float,
    price_output: float,
) -> None:
    address = "give an address with http:// or https://, e.g. http://localhost:8000/v1"
    whole = base_url.rstrip("/").endswith("/chat/completions")
    for field, value, is_good, fix in (
        ("base_url", base_url, _is_address(base_url), address),
        ("base_url", base_url, not whole, "leave out /chat/completions, which is added to it"),
        ("model", model, model, "give the name that the server has for the model"),
        ("concurrency", concurrency, concurrency >= 1, "give at least 1"),
        ("timeout", timeout, timeout > 0, "give more than 0 seconds"),
        ("max_retries", max_retries, max_retries >= 0, "give at least 0"),
        ("price_input", price_input, price_input >= 0, "give at least 0"),
        ("price_output", price_output, price_output >= 0, "give at least 0"),
    ):
        if not is_good:
            raise ValueError(f"reflection.{field}={value!r}: {fix}")


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        return False
