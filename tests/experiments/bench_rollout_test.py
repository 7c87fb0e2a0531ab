"""The benchmark's table, on figures worked out by hand."""

import pytest

from experiments import bench_rollout
from experiments.bench import peers, variants

OURS = {"peer": "ours", "variant": "a", "seconds": [2.0, 4.0, 8.0]}
SLOWER = {"peer": "ours", "variant": "b", "seconds": [4.0]}
TORCH = {"peer": "transformers", "variant": "c", "seconds": [10.0, 5.0]}
BROKEN = {"peer": "tunix", "variant": "d", "error": "Traceback:\nx | y"}
REPORTED = {"first_call": 12.34, "peak_bytes": 3 * 2**29, "versions": {"jax": "0.10.2", "flax": "0.12"}}


def cells(rows):
    lines = bench_rollout.table([row if "error" in row else row | REPORTED for row in rows], 100)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines.splitlines()]


def test_rates_are_of_the_best_and_the_median_call():
    assert bench_rollout.rates(OURS, 100) == (50.0, 25.0)


def test_table_compares_best_calls_with_the_best_variant_of_each_peer():
    header, _, ours, slower, torch, broken = cells([OURS, SLOWER, TORCH, BROKEN])
    tail = ["12.3", "1.50", "jax 0.10.2, flax 0.12"]
    assert ours == ["ours", "a", "50.0", "25.0", "1.00", "2.50", *tail]
    assert slower == ["ours", "b", "25.0", "25.0", "0.50", "1.25", *tail]
    assert torch == ["transformers", "c", "20.0", "13.3", "0.40", "1.00", *tail]
    assert broken == ["tunix", "d", "failed: x / y", *"------"]
    assert len(header) == len(ours) == len(broken)


def test_table_without_transformers_has_no_ratio_to_it():
    *_, ours = cells([OURS])
    assert ours[4:6] == ["1.00", "-"]


@pytest.mark.parametrize("settings", [variant.settings for variant in bench_rollout.VARIANTS])
def test_every_variant_has_a_runner_and_settings_of_its_own(settings):
    same = [variant for variant in bench_rollout.VARIANTS if variant.settings == settings]
    assert len({variant.peer for variant in same}) == len(same)
    for variant in same:
        assert (variants.SCRIPTS / f"run_{variant.peer}.py").is_file()


def test_a_command_that_fails_says_so_with_its_last_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    script = "import sys; [print(i, file=sys.stderr) for i in range(9)]; sys.exit(3)"
    with pytest.raises(RuntimeError, match=r"^4\n5\n6\n7\n8$"):
        peers.run([peers.sys.executable, "-c", script])


def test_a_command_that_is_killed_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(RuntimeError, match=r"^ended with exit code -9$"):
        peers.run([peers.sys.executable, "-c", script])


def test_a_command_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match="not finished after 1 s"):
        peers.run([peers.sys.executable, "-c", "import time; time.sleep(60)"], timeout=1)
