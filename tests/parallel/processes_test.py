"""Two real processes: what the first one decides is everyone's, and what differs is found."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from espl_jax.parallel import processes
from espl_jax.parallel.memory import device_memory
from espl_jax.parallel.processes import agree, decide, is_first, only_first, start
from espl_jax.run.reflection import Beside
from tests.support.two_processes import run_pair


@dataclasses.dataclass
class Pair:
    left: object
    right: object


class Unpicklable(Exception):
    def __init__(self, code, what):
        super().__init__(f"{what}: {code}")


def error_of(function, *args):
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def fail(error):
    raise error


def digits(size, calls):
    calls.append(size)
    return f"{jax.process_index()}" * size


def disagreements():
    """Which of these the processes find to differ, in order."""
    here = jax.process_index()
    first = np.arange(3000, dtype=np.float32)
    other = first.copy()
    other[1500] = np.nextafter(other[1500], np.float32(0)) if here else other[1500]  # no `repr` shows it
    text = "".join(["ab", "cd"])
    pairs = {
        "equal": {"a": [1, 2.5, None, first], "b": Pair((text, text), b"bytes")},
        "objects": ["abcd", "abcd"] if here else [text, text],
        "bits": {"deep": [Pair(other, 0)]},
        "dtype": first.astype(np.float64) if here else first,
        "shape": first.reshape(3, -1) if here else first,
        "nesting": [[1], [2]] if here else [[1, 2], []],
        "number": 0.1 + 0.2 if here else 0.3,
        "order": {"a": 1, "b": 2} if here else {"b": 2, "a": 1},
    }
    return [name for name, value in pairs.items() if error_of(agree, name, value)]


def meet():
    """Everything that the two processes show, as one JSON object."""
    here = jax.process_index()
    calls = []
    said = {
        "first": is_first(),
        "decided": [decide(functools.partial(digits, size, calls)) for size in (0, 1, 70_000)],
        "calls": len(calls),
        "errors": [
            error_of(decide, lambda: fail(OSError(28, "full"))),
            error_of(decide, lambda: fail(Unpicklable(3, "lost"))),
            error_of(decide, lambda: lambda: None),  # cannot be sent
        ],
        "only_first": only_first(lambda: here + 1),
        "only_first_error": error_of(only_first, lambda: fail(ValueError("no key"))),
        "differ": disagreements(),
        "message": error_of(agree, "iteration 3", here),
        "memory": device_memory(),
        "beside": Beside(lambda: f"reply to {here}").result(),
        "beside_error": error_of(Beside(lambda: fail(RuntimeError("401"))).result),
    }
    print(json.dumps(said))


def test_two_processes():
    outputs = run_pair("from tests.parallel.processes_test import meet; meet()")
    zero, one = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert (zero.pop("first"), one.pop("first")) == (True, False)
    assert (zero.pop("calls"), one.pop("calls")) == (3, 0)
    assert (zero.pop("only_first"), one.pop("only_first")) == (1, None)
    assert zero == one  # all the rest
    assert zero["decided"] == ["", "0", "0" * 70_000]
    full, lost, unsent = zero["errors"]
    assert full == "OSError: [Errno 28] full" and lost == "RuntimeError: Unpicklable: lost: 3"
    assert "pickle" in unsent
    assert zero["only_first_error"] == "ValueError: no key"
    assert zero["differ"] == ["bits", "dtype", "shape", "nesting", "number", "order"]
    assert zero["message"].startswith(
        "RuntimeError: iteration 3 differs between process 0 and 1: restart all"
    )
    assert zero["beside"] == "reply to 0" and zero["beside_error"] == "RuntimeError: 401"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("host:1", 0, 0), "coordinator_address=host:1, num_processes=0"),
        (("host:1", 2, 2), "process_id=2: process_id must"),
        (("", 2, 0), "num_processes=2: coordinator_address is missing"),
    ],
)
def test_what_makes_no_sense_is_refused(args, message):
    with pytest.raises(ValueError, match=message):
        start(*args)


def test_one_process_decides_for_itself(monkeypatch):
    monkeypatch.setattr(processes, "_meet", lambda: pytest.fail("waited"))
    assert decide(lambda: 3) == only_first(lambda: 3) == 3 and is_first()
    agree("a value without a repr of its own", object())
    with pytest.raises(KeyError):
        decide(lambda: fail(KeyError("x")))
