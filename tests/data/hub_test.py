import subprocess
import sys

import pyarrow as pa
import pytest

from tests.support import dataset_hub
from tests.support.dataset_hub import aime, gsm8k, statement

ROWS = {
    "org/plain": {"train": aime("mill", 3), "test": aime("hall", 2)},
    "org/configs": {("main", "train"): gsm8k("mill", 2), ("other", "train"): gsm8k("hall", 3)},
    "org/repeats": {"train": [*aime("mill", 3), *aime("mill", 1, answer="9")]},
    "org/gated": {"train": aime("mill", 1)},
    "org/half": {"train": aime("mill", 3), "test": pa.Table.from_pylist(aime("hall", 2)).slice(0, 0)},
    "org/questions": {
        (config, "train"): [
            {"id": "train_0", "question": statement(place, 0), "golden_answers": ["1", "one"]},
            {"id": "train_1", "question": statement(place, 1), "golden_answers": ["2"]},
        ]
        for config, place in (("nq", "mill"), ("hotpotqa", "hall"))
    },
    "org/none": {},
}
JOBS = {
    "plain": {"spec": "hub:org/plain"},
    "split": {"spec": "hub:org/plain:split=test"},
    "slice": {"spec": "hub:org/plain:split=train[1:],count=1"},
    "joined": {"spec": "hub:org/plain + hub:org/plain:split=test"},
    "config": {"spec": "hub:org/configs:config=other,skip=1"},
    "fields": {"spec": "hub:org/plain:answer=answer,id=", "fields": {"answer": "url"}},
    "lists": {
        "spec": "hub:org/questions:config=nq,answer=golden_answers,count=1"
        " + hub:org/questions:config=hotpotqa,answer=golden_answers"
    },
    "first": {"spec": "hub:org/repeats:repeats=first,id="},
    "half": {"spec": "hub:org/half"},
    "empty": {"spec": "hub:org/half:split=test"},
    "no config": {"spec": "hub:org/configs"},
    "wrong config": {"spec": "hub:org/configs:config=third"},
    "wrong split": {"spec": "hub:org/plain:split=dev"},
    "wrong revision": {"spec": "hub:org/plain:revision=v9"},
    "repeats": {"spec": "hub:org/repeats"},
    "gated": {"spec": "hub:org/gated"},
    "missing": {"spec": "hub:org/absent"},
    "no data": {"spec": "hub:org/none"},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What comes of each job; of the first one offline, too, and of one that is not in the cache."""
    folder = tmp_path_factory.mktemp("hub")
    with dataset_hub.loader(ROWS, folder, gated=["org/gated"]) as load:
        done = dict(zip(JOBS, load(*JOBS.values()), strict=True))
        later = {"spec": "hub:org/later"}
        done["offline"], done["not cached"] = load(JOBS["plain"], later, HF_HUB_OFFLINE="1")
    return done


TRAIN = [("plain-0", "mill", 0), ("plain-1", "mill", 1), ("plain-2", "mill", 2)]
TEST = [("plain-test-0", "hall", 0), ("plain-test-1", "hall", 1)]


@pytest.mark.parametrize(
    ("job", "name", "rows"),
    [
        ("plain", "hub:org/plain (train)", TRAIN),
        ("split", "hub:org/plain (test)", TEST),
        ("slice", "hub:org/plain (train[1:])", [("plain-train[1:]-1", "mill", 1)]),
        ("joined", "hub:org/plain (train) + hub:org/plain (test)", TRAIN + TEST),
        ("config", "hub:org/configs (train)", [(None, "hall", 1), (None, "hall", 2)]),
        ("fields", "hub:org/plain (train)", [(None, "mill", i) for i in range(3)]),
        (
            "lists",
            "hub:org/questions (train) + hub:org/questions (train)",
            [
                ("questions-nq-train_0", "mill", 0),
                ("questions-hotpotqa-train_0", "hall", 0),
                ("train_1", "hall", 1),
            ],
        ),
        ("first", "hub:org/repeats (train)", [(None, "mill", i) for i in range(3)]),
        ("half", "hub:org/half (train)", [(f"half-{i}", "mill", i) for i in range(3)]),
        ("offline", "hub:org/plain (train)", TRAIN),
    ],
)
def test_problems_of_the_hub(answers, job, name, rows):
    assert not isinstance(answers[job], str), answers[job]
    said, problems = answers[job]["all"]
    assert said == name
    assert [problem[1:] for problem in problems] == [[statement(kind, i), str(i + 1)] for _, kind, i in rows]
    for (identity, _, _), (expected, _, _) in zip(problems, rows, strict=True):
        assert identity == expected if expected else len(identity) == 12


@pytest.mark.parametrize(
    ("job", "parts"),
    [
        ("no config", ("ValueError: hub:org/configs: ", "'main', 'other'", "config=NAME")),
        ("empty", ("ValueError: hub:org/half: the split 'test' is empty; choose", "split=NAME")),
        ("wrong config", ("ValueError: hub:org/configs: ", "'third' not found", "'main', 'other'")),
        ("wrong split", ("ValueError: hub:org/plain: ", '"dev"', "'train', 'test'", "split=NAME")),
        ("wrong revision", ("FileNotFoundError: hub:org/plain has no revision 'v9'; give a branch", "plain")),
        ("repeats", ("ValueError: hub:org/repeats, row 4: ", "'9' instead of '1'", "repeats=first")),
        ("gated", ("PermissionError: hub:org/gated is gated; accept its terms at http", "`hf auth login`")),
        ("missing", ("FileNotFoundError: hub:org/absent does not exist at http", "correct the name")),
        ("no data", ("FileNotFoundError: hub:org/none has no readable data", "choose another")),
        (
            "not cached",
            ("ConnectionError: hub:org/later is not in the cache ", "unset HF_HUB_OFFLINE", ".jsonl"),
        ),
    ],
)
def test_errors_of_the_hub_are_one_sentence_with_the_fix(answers, job, parts):
    message = answers[job]
    assert isinstance(message, str), message
    assert message.startswith(parts[0]), message
    for part in parts[1:]:
        assert part in message, message
    assert "\n" not in message


@pytest.mark.slow  # the hub is asked again and again for 25 seconds
def test_a_hub_that_does_not_answer(tmp_path):
    with dataset_hub.loader(ROWS, tmp_path) as load:
        (there,) = load(JOBS["plain"])
        cached, message = load(JOBS["plain"], {"spec": "hub:org/later"}, HF_ENDPOINT="http://127.0.0.1:9")
    assert cached == there
    assert message.startswith("ConnectionError: hub:org/later is not in the cache ")
    assert "http://127.0.0.1:9/datasets/org/later cannot be reached" in message


def test_the_package_is_imported_only_where_it_is_needed():
    names = {"datasets", "pyarrow", "pandas"}
    code = f"import sys, espl_jax.data.load; sys.exit(' '.join({names} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
