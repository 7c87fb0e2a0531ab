"""How the training benchmark searches, compares and prints, on figures worked out by hand."""

import pytest

from experiments import bench_train
from experiments.bench import variants

REPORTED = {"first_call": 12.34, "peak_bytes": 3 * 2**29, "versions": {"jax": "0.10.2"}}
FLOAT32 = {"loss": 2.0, "grad_norm": 10.0, "settings": {"dtype": "float32"}}


def row(peer, seconds, **settings):
    return FLOAT32 | REPORTED | {"case": "adapters", "peer": peer, "settings": settings, "seconds": seconds}


def test_the_search_keeps_the_best_of_each_group_for_the_next():
    # b=1 is good with a=2 alone; c fails.
    cost = {(0, 0): 9.0, (1, 0): 8.0, (2, 0): 7.0, (2, 1): 5.0}
    tried = []

    def run(settings):
        tried.append(settings)
        if settings["c"]:
            return {"settings": settings, "error": "out of memory"}
        return {"settings": settings, "seconds": [99.0, cost[settings["a"], settings["b"]]]}

    first = {"a": 0, "b": 0, "c": 0}
    best = bench_train.descend(first, (({"a": 1}, {"a": 2}), ({"b": 1},), ({"c": 1},)), run)
    assert best["settings"] == {"a": 2, "b": 1, "c": 0}
    assert [tuple(settings.values()) for settings in tried] == [
        *((0, 0, 0), (1, 0, 0), (2, 0, 0)),
        (2, 1, 0),
        (2, 1, 1),
    ]


def test_if_the_first_settings_fail_others_are_taken():
    def run(settings):
        return {"seconds": [1.0]} if settings["a"] else {"error": "x"}

    assert bench_train.descend({"a": 0}, (({"a": 1},),), run) == {"seconds": [1.0]}


@pytest.mark.parametrize(
    ("settings", "close", "far"),
    [
        ({"dtype": "float32", "param_dtype": "float32", "remat": "none"}, 1.0009, 1.0011),
        ({"dtype": "float32", "param_dtype": "bfloat16"}, 1.029, 1.031),
        ({"dtype": "autocast", "checkpointing": False}, 1.029, 1.031),
    ],
)
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_measured_has_to_compute_the_same(settings, close, far, name):
    other = FLOAT32 | {"settings": settings}
    bench_train.check(other | {name: FLOAT32[name] * close}, FLOAT32)
    with pytest.raises(RuntimeError, match=f"its {name} is .*, expected {FLOAT32[name]:g}"):
        bench_train.check(other | {name: FLOAT32[name] * far}, FLOAT32)


def test_table_compares_with_the_best_step_of_the_peer():
    ours = row("ours", [4.0, 5.0, 9.0], scan_layers=True, trained="adapters")
    slow, fast = row("transformers", [20.0]), row("transformers", [12.0, 10.0])
    failed = {"case": "weights", "peer": "ours", "settings": {}, "error": "Traceback:\nx | y"}
    lines = bench_train.table([ours, slow, fast, failed]).splitlines()
    header, _, *cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    tail = ["12.3", "1.50", "2.0000", "10.0000", "jax 0.10.2"]
    assert cells[0] == ["adapters", "ours", "scan_layers=True", "4.0", "5.0", "2.50", *tail]
    assert cells[1] == ["adapters", "transformers", "", "20.0", "20.0", "0.50", *tail]
    assert cells[2][3:6] == ["10.0", "11.0", "1.00"]
    assert cells[3] == ["weights", "ours", "", "failed: x / y", *"-------"]
    assert {len(line) for line in cells} == {len(header)}


def test_every_side_has_a_script_and_changes_of_settings_that_it_knows():
    for peer, first in bench_train.FIRST.items():
        assert (variants.SCRIPTS / f"run_{peer}_train.py").is_file()
        changed = [change for group in bench_train.CHANGES[peer] for change in group]
        assert all(change.keys() <= first.keys() for change in changed)
