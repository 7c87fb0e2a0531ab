"""The page as text: escaping, contents, comparisons, the command."""

import base64
import dataclasses
import gzip
import json
import re
import runpy
import shlex
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from absl import app

from espl_jax.console import command_line
from espl_jax.report import compare
from espl_jax.report.configuration import fields_of, find_defaults, resume_command
from espl_jax.report.page import render
from espl_jax.report.read import read_run
from espl_jax.report.write import RunReport, write_report
from espl_jax.storage.json_values import plain
from tests.conftest import ROOT
from tests.support import fakes
from tests.support.flags import fresh_flags, run_app
from tests.support.made_runs import HOSTILE, write_run


class Elements(HTMLParser):
    """Counts the elements of a page, and collects the texts of its scripts by id."""

    def __init__(self, page):
        super().__init__()
        self.counts, self.blocks, self._block = {}, {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self._block = dict(attrs).get("id", "") if tag == "script" else None

    def handle_data(self, data):
        if self._block is not None:
            self.blocks[self._block] = self.blocks.get(self._block, "") + data


def unpacked(data):
    return json.loads(gzip.decompress(base64.b64decode(data)))


def without_tokenizer(monkeypatch):
    monkeypatch.setattr("espl_jax.report.write.find_decoder", lambda source: None)


def test_text_of_models_is_escaped(tmp_path):
    run = read_run(write_run(tmp_path / "<b>run", hostile=True))
    page = render([run])
    tame = render([read_run(write_run(tmp_path / "tame"))])
    hostile, expected = Elements(page).counts, Elements(tame).counts
    assert "img" not in hostile and hostile["script"] == expected["script"], "hostile texts made elements"
    for text in HOSTILE:
        assert text not in page
    assert "&lt;b&gt;run" in page
    data = unpacked(Elements(page).blocks["run0-iteration-1"])
    assert data["rollouts"][0]["answer"] == HOSTILE[1], "the page has the text itself"


def test_the_page_is_the_same_every_time_and_needs_no_network(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    page = render([run])
    assert page == render([run])
    template = re.sub(r'<script type="text/plain".*?</script>', "", page, flags=re.DOTALL)
    assert not re.search(r" src=|url\(|@import|fetch\(|XMLHttp|import\(", template)
    assert set(re.findall(r'href="([^"#]*)', template)) == {"", "data:,"}


def test_scripts_put_no_text_into_markup():
    for path in sorted((ROOT / "espl_jax" / "report" / "page").glob("*.js")):
        source = path.read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "</script"):
            assert word not in source, f"{path.name}: {word}"


def test_headline(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    page = render([run])
    for weights, prompt in (("initial", "root"), ("trained", "deployed")):
        assert f"{100 * run.results['test'][weights][prompt]['accuracy']:.1f}%" in page
    assert "3.00 GiB" in page and "Tokens trained on" in page and "--config.num_iterations=3" in page


@pytest.mark.parametrize("mode", ["rl", "evolution", "reflection"])
def test_an_unfinished_run_of_every_mode(mode, tmp_path):
    page = render([read_run(write_run(tmp_path / "run", mode=mode, finished=False))])
    assert "not finished" in page and "The test runs at the end of the run." in page


def test_runs_side_by_side(tmp_path):
    paths = [write_run(tmp_path / mode, mode=mode, seed=i) for i, mode in enumerate(("espl", "rl"))]
    runs = [read_run(path) for path in paths]
    page = render(runs)
    assert "rl − espl" in page and "<code>mode</code>" in page
    assert [each["name"] for each in unpacked(Elements(page).blocks["overview"])] == ["espl", "rl"]
    assert {"run0-members", "run1-members"} <= Elements(page).blocks.keys()


def test_seeds_of_a_method_share_a_row(tmp_path):
    runs = [read_run(write_run(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    rates = [compare.test_rates(run) for run in runs]
    (method,) = compare.methods_of(runs, ["a", "b"], rates)
    assert method.runs == (0, 1) and method.seeds == (0, 1) and method.rates.shape == (2, 50)
    assert method.rates.mean(axis=1).tolist() == pytest.approx(
        [run.results["test"]["trained"]["deployed"]["accuracy"] for run in runs]
    )
    assert "with 95% intervals over seeds and problems" in render(runs)


def test_paired_differences(tmp_path):
    runs = [read_run(write_run(tmp_path / mode, mode=mode)) for mode in ("espl", "rl")]
    rates = [compare.test_rates(run) for run in runs]
    methods = compare.methods_of(runs, ["espl", "rl"], rates)
    (found,) = compare.differences(methods)
    mean = 100 * (methods[1].rates - methods[0].rates).mean()
    assert (found.problems, found.seeds) == (50, 1) and found.text.startswith(f"{mean:+.1f} points [")
    same = compare.differences([methods[0], methods[0]])[0]
    assert same.text == "+0.0 points (no interval: all problems have the same difference)"
    nothing = compare.methods_of(runs, ["espl", "rl"], [{}, {}])
    assert compare.differences(nothing) == [] and compare.accuracy(nothing[0]) == "–"


def test_differences_are_paired_by_seed_and_problem():
    """By hand: seeds come in another order, one is missing, and so is a problem."""
    first = compare.Method("a", (0, 1), (0, 1), np.array([[0.0, 0, 1], [0, 0, 0]]), ("x", "y", "z"))
    second = compare.Method("b", (2, 3, 4), (2, 1, 0), np.array([[9.0, 9], [1, 1], [1, 0]]), ("z", "x"))
    (found,) = compare.differences([first, second])
    assert (found.seeds, found.problems) == (2, 2)
    assert found.text.startswith("+50.0 points [")  # of both problems 0 with seed 0, and 1 with seed 1
    alone = dataclasses.replace(second, seeds=(7, 8, 9))
    (found,) = compare.differences([first, alone])
    assert found.seeds == 0 and found.text.startswith("+325.0 points ["), "means over seeds"


def test_the_command_to_resume_gives_the_same_configuration(tmp_path, monkeypatch):
    run = read_run(write_run(tmp_path / "a run"))
    config = json.loads(json.dumps(run.config))
    config["population"] |= {"text": 'Say "sum",\nplease.', "principles": ["It's <b>."]}
    config["optimizer"]["learning_rate"] = 1.5e-3
    fields = fields_of(config, find_defaults())
    assert {each.name for each in fields if each.differs} >= {"population.text", "num_iterations"}
    words = shlex.split(resume_command(run, fields).replace("\\\n", ""))
    assert words[:3] == ["python", "-m", "espl_jax.main"] and f"--workdir={run.path}" in words
    argv = ["main", f"--config={ROOT}/configs/common.py", *(w for w in words if w.startswith("--config."))]
    monkeypatch.setattr(sys, "argv", argv)
    with fresh_flags():
        holder = command_line.define_config()
        command_line.parse_flags(argv)
        assert plain(holder.value.to_dict(), "config") == config


def test_writes_into_the_work_directory(tmp_path, monkeypatch):
    without_tokenizer(monkeypatch)
    path = write_run(tmp_path / "run")
    assert write_report([path]) == path / "report.html"
    assert "the tokenizer is not on this machine" in (path / "report.html").read_text()
    assert write_report([path], tmp_path / "other.html") == tmp_path / "other.html"
    monkeypatch.chdir(tmp_path)
    other = write_run(tmp_path / "second")
    assert str(write_report([path, other])) == "comparison.html" and not (other / "report.html").exists()
    assert "2 runs" not in (path / "report.html").read_text()


def test_the_command_leaves_alone_a_page_that_the_run_is_writing(tmp_path, monkeypatch):
    without_tokenizer(monkeypatch)
    path = write_run(tmp_path / "run")
    (path / ".report.html.new").write_text("half a page")
    write_report([path])
    assert (path / ".report.html.new").read_text() == "half a page"


def test_mistakes_are_told_in_a_sentence(tmp_path, monkeypatch):
    without_tokenizer(monkeypatch)
    path = write_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="give the --workdir of a run"):
        write_report([tmp_path / "none"])
    with pytest.raises(ValueError, match="given twice; give each run once"):
        write_report([path, f"{path}/"])
    with pytest.raises(ValueError, match="at least one run"):
        write_report([])
    with pytest.raises(FileNotFoundError, match="does not exist; make it first"):
        write_report([path], tmp_path / "no" / "report.html")


def test_results_of_an_earlier_end_are_not_shown(tmp_path):
    path = write_run(tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_iterations": 10}))
    assert "3 of 10" in render([read_run(path)]) and "not finished" in render([read_run(path)])


def test_what_a_file_or_json_cannot_hold(tmp_path):
    """Lone surrogates in texts, and numbers that are not finite."""
    path = write_run(tmp_path / "run", iterations=1)
    results = json.loads((path / "results.json").read_text())
    (path / "results.json").write_text(json.dumps(results | {"reason": "\ud800"}))
    record = json.loads((path / "metrics.jsonl").read_text())
    (path / "metrics.jsonl").write_text(json.dumps(record | {"kl": float("nan")}) + "\n")
    page = render([read_run(path)]).encode().decode()
    charts = unpacked(Elements(page).blocks["overview"])[0]["curves"]["charts"]
    assert next(each["lines"] for each in charts if each["key"] == "kl") == {"KL": [None]}


def test_a_running_run_survives_a_failure():
    said = []

    class Full:
        path = "/nowhere/at/all"

        def write_made(self, name, make):
            raise OSError("disk full")

    report = RunReport(Full(), fakes.model(), said.append)
    report.write()
    report.write()
    assert len(said) == 1 and "report.html was not written" in said[0]


def test_the_command(tmp_path, monkeypatch, capsys):
    without_tokenizer(monkeypatch)
    path = write_run(tmp_path / "run")

    def command(*args):
        with fresh_flags(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(app, "run", run_app)
            patch.setattr(sys, "argv", ["report", *args])
            with pytest.raises(SystemExit) as end:
                runpy.run_module("espl_jax.report", run_name="__main__", alter_sys=True)
        return end.value.code

    assert not command(f"--workdir={path}")
    assert capsys.readouterr().out == f"Written: {path}/report.html\n"
    assert "config.json" in command(f"--workdir={tmp_path}/none")
