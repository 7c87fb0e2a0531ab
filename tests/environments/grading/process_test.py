import json
import types

import pytest

from espl_jax.environments.grading import process

LARGE = 1 << 40
"""More address space than any test process has."""


def reply(judge, timeout=20.0, memory=LARGE, prepare=lambda rule, gold: None):
    module = types.SimpleNamespace(judge=judge, prepare=prepare)
    return json.loads(process._in_a_fork(module, b'["boxed", "5", "10/2"]', timeout, memory))


def fail(*question):
    raise RecursionError


def crash(*question):
    process.os.kill(process.os.getpid(), process.signal.SIGKILL)


def stop(*question):
    process.os.kill(process.os.getpid(), process.signal.SIGSTOP)


def turn(*question):
    while True:
        pass


def take_memory(*question):
    return len(bytearray(1 << 30)) > 0, "5"


@pytest.mark.parametrize(
    ("judge", "timeout", "expected"),
    [
        (lambda *question: (True, question[2]), 20.0, [True, "10/2", "graded"]),
        (fail, 20.0, [False, None, "error"]),
        (crash, 20.0, [False, None, "died"]),
        (stop, 0.2, [False, None, "timeout"]),
        (turn, 0.2, [False, None, "timeout"]),
    ],
)
def test_outcomes(judge, timeout, expected):
    assert reply(judge, timeout) == expected


def test_memory_is_limited():
    assert reply(take_memory)[2] == "graded"
    assert reply(take_memory, memory=1 << 30)[2] in ("error", "died")


def test_files_cannot_be_written(tmp_path):
    def write(*question):
        (tmp_path / "file").write_text("x")
        return True, ""

    assert reply(write)[2] in ("error", "died")
    assert not (tmp_path / "file").exists() or not (tmp_path / "file").read_text()


def test_forks_see_what_was_prepared():
    seen = []

    def prepare(rule, gold):
        seen.append((rule, gold))

    for count in (1, 2):
        assert reply(lambda *question: (True, str(len(seen))), prepare=prepare)[1] == str(count)
    assert seen == [("boxed", "5")] * 2
    assert reply(lambda *question: (True, ""), prepare=fail) == [False, None, "error"]


def test_one_question_leaves_nothing_to_the_next():
    seen = []

    def remember(*question):
        seen.append(question)
        return len(seen) == 1, None

    assert [reply(remember)[0] for _ in range(2)] == [True, True]
