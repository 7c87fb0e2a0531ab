"""`python -m espl_jax.evaluate`: what cannot be done is refused in a sentence; what can, is shown."""

import json

import pytest

from tests.conftest import run_module
from tests.support.devices import xla_flags


def run(*args, **environment):
    return run_module("espl_jax.evaluate", *args, **environment)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data=addition:digits=1,count=8"], "--model is missing; give at least one, e.g. --model=smollm2"),
        (["quickly"], "unexpected argument quickly"),
        (["--modle=x"], "Unknown command line flag 'modle'"),
        (
            ["--model=a", "--data=addition:digits=1,count=3", "--environment=chess"],
            "--environment=chess: choose one of math, arithmetic, reasoning_gym, search",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refused_before_jax_is_imported(args, message, without_jax):
    done = without_jax("espl_jax.evaluate", *args)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.slow
def test_sums_by_smollm2(tmp_path):
    """Two prompts in a table; one of them alone gives the same figures, and every rollout is written."""
    common = ["--model=smollm2", "--data=addition:digits=1,count=8", "--environment=arithmetic"]
    common += ["--answer_format=last_number", "--max_new_tokens=12"]
    add = "--prompt=Reply with the sum."
    one = {"XLA_FLAGS": xla_flags(1)}
    both = run(*common, add, "--prompt=", f"--out={tmp_path / 'a.json'}", **one)
    alone = run(*common, add, f"--out={tmp_path / 'b.json'}", f"--out={tmp_path / 'b.jsonl'}", **one)
    assert both.returncode == alone.returncode == 0, both.stderr + alone.stderr
    assert both.stdout.startswith("model        smollm2\ndata ")
    assert "| Reply with the sum.      | " in both.stdout
    results = [json.loads((tmp_path / name).read_text())["results"] for name in ("a.json", "b.json")]
    assert results[0][0] == results[1][0] and len(results[0]) == 2
    rollouts = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert len(rollouts) == 8 * 4
    right = sum(each["success"] for each in rollouts) / len(rollouts)
    assert results[1][0]["evaluation"]["accuracy"] == right
    again = run(*common, f"--out={tmp_path / 'a.json'}")
    assert again.returncode == 1 and "the file exists" in again.stderr
