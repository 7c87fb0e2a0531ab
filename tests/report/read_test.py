"""Reading work directories, of any mode and in any state."""

import json

import numpy as np
import pytest

from espl_jax.report.build import build
from espl_jax.report.read import names_of, read_run
from espl_jax.report.scores import advantages_of
from espl_jax.report.series import group_rates
from espl_jax.report.tokens import decoder_of
from tests.support.made_runs import write_run


@pytest.mark.parametrize("mode", ["espl", "rl", "evolution", "reflection"])
def test_every_mode_is_read(mode, tmp_path):
    run = read_run(write_run(tmp_path / "run", mode=mode))
    assert run.config["mode"] == mode and len(run.metrics) == 3
    assert len(run.members) == (1 if mode == "rl" else 4)
    assert run.root == "p0" and run.deployed in {each.id for each in run.members}
    assert [iteration for iteration, _ in run.by_iteration("rollouts")] == [1, 2, 3]
    page = build(run, 0)
    assert page.tokens["rollouts"] > 0 and page.blocks[0].id == "run0-members"


def test_an_unfinished_run_is_read(tmp_path):
    path = write_run(tmp_path / "run", finished=False)
    with (path / "rollouts.jsonl").open("a") as file:
        file.write('{"iteration": 4, "repl')
    run = read_run(path)
    assert run.results == {} and run.deployed == run.metrics[-1]["best_prompt"]["id"]
    assert [iteration for iteration, _ in run.by_iteration("rollouts")] == [1, 2, 3]


def test_a_run_before_its_first_iteration_is_read(tmp_path):
    path = write_run(tmp_path / "run", finished=False)
    for log in ("metrics", "rollouts", "problems", "reflections"):
        (path / f"{log}.jsonl").unlink()
    (path / "population.json").unlink()
    run = read_run(path)
    assert run.metrics == () and run.deployed == "p0"
    assert build(run, 0).tokens["rollouts"] == 0


def test_an_older_run_is_read(tmp_path):
    path = write_run(tmp_path / "run", token_logprobs=False)
    for name in ("problems.jsonl", "machine.json"):
        (path / name).unlink()
    run = read_run(path)
    assert run.problems == {} and run.machine == {}
    assert build(run, 0).tokens["rollouts"] > 0


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json of a run; give the --workdir of a run"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileNotFoundError, match="no config"):
        read_run(tmp_path)


def test_damage_is_named(tmp_path):
    path = write_run(tmp_path / "run")
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join([lines[0], "{broken\n", *lines[1:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON .*; restore the line"):
        read_run(path)
    (path / "metrics.jsonl").write_text("".join(lines))
    (path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is not JSON"):
        read_run(path)


def test_names_tell_runs_apart(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    runs = [read_run(write_run(path)) for path in paths]
    assert names_of(runs) == ["a/run", "b/run"] and names_of(runs[:1]) == ["run"]


def test_advantages_are_those_of_the_run(tmp_path):
    run = read_run(write_run(tmp_path / "run", samples=4))
    _, rows = next(run.by_iteration("rollouts"))
    found = advantages_of(rows, {"baseline": "marginalized", "normalize_advantages": "none"})
    for row, advantage in zip(rows, found, strict=True):
        others = [each["reward"] for each in rows if each["problem"] == row["problem"]]
        assert advantage == pytest.approx(row["reward"] - np.mean(others), abs=1e-3)
    assert advantages_of(rows[1:], {}) == [None] * (len(rows) - 1)


def test_pass_at_k_of_groups():
    rows = [
        {"slot": 0, "problem": "a", "success": True},
        {"slot": 0, "problem": "a", "success": False},
        {"slot": 0, "problem": "b", "success": False},
        {"slot": 0, "problem": "b", "success": False},
    ]
    assert group_rates(rows) == {"1": 0.25, "2": 0.5} and group_rates([]) == {}


def test_tokens_are_decoded_with_their_spaces():
    class Strips:
        """Decodes like tokenizers that drop the first space."""

        def encode(self, text, add_special_tokens):
            return [0]

        def decode(self, tokens):
            return "".join(["a", " the", "x"][token] for token in tokens).lstrip()

    decode = decoder_of(Strips())
    assert [decode(1), decode(2)] == [" the", "x"]


def test_conversations_and_rollouts_have_their_blocks(tmp_path):
    run = read_run(write_run(tmp_path / "run"), decode=str)
    page = build(run, 2)
    ids = [block.id for block in page.blocks]
    assert ids == ["run2-members", "run2-vocabulary", *(f"run2-iteration-{i}" for i in (1, 2, 3))]
    assert page.overview["shown"]["1"] == {
        "rollouts": 24,
        "of": 24,
        "cut": 0,
        "conversations": 5,
        "conversations_of": 5,
    }
    assert json.dumps(page.overview, allow_nan=False)
