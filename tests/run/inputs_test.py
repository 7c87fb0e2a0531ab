"""Files replaced between stop and resume are noticed, by name."""

import dataclasses
import json
import sys

import pytest
from absl import logging

from espl_jax.data.problems import ProblemSet
from espl_jax.run import inputs, parts, state
from espl_jax.run.saved import read_run
from espl_jax.storage.workdir import WorkDir
from espl_jax.types import Problem
from tests.support import fakes


def test_a_large_file_is_sampled(tmp_path, monkeypatch):
    """Its size, its ends and blocks between them; what lies between two blocks is not covered."""
    monkeypatch.setattr(inputs, "WHOLE", 100)
    monkeypatch.setattr(inputs, "BLOCKS", 3)
    monkeypatch.setattr(inputs, "BLOCK", 10)
    file = tmp_path / "weights"

    def digest(content):
        file.write_bytes(content)
        return inputs.file_digest(file)

    zeros = bytes(200)
    assert digest(zeros) == digest(zeros) != digest(bytes(201))

    def noticed(content):
        same = digest(content)
        return [i for i in range(4, 200, 5) if digest(content[:i] + b"x" + content[i + 1 :]) != same]

    assert noticed(zeros) == [4, 9, 99, 104, 194, 199]
    assert noticed(bytes(100))[:20] == list(range(4, 100, 5))


def test_problems_are_covered_wherever_they_come_from():
    """Every field of every problem and their order; a held-out validation set belongs to its source."""
    problems = (Problem("a", "1 + 1", "2"), Problem("b", "1 + 2", "3", ("three",)))

    def found(problems, **changes):
        splits = {"train": ProblemSet(problems, "x"), "validation": ProblemSet(problems[:1], "x")}
        return inputs.fingerprints(fakes.config(**changes), splits, {})

    before = found(problems)
    assert set(before) == {"data.train", "data.validation", "model.source"}
    for change in ({"id": "c"}, {"text": "2 + 1"}, {"answer": "4"}, {"aliases": ("drei",)}):
        changed = (problems[0], dataclasses.replace(problems[1], **change))
        assert inputs.changes(before, found(changed)) == {"data.train": ["problems of train"]}
    both = {"data.train": ["problems of train"], "data.validation": ["problems of validation"]}
    assert inputs.changes(before, found(problems[::-1])) == both
    held = {"data__validation": ""}
    assert inputs.changes(found(problems, **held), found(problems[::-1], **held)) == {
        "data.train": ["problems of train", "problems of validation"]
    }


class TestResume:
    """A run of prompts alone that rewards by a module, starts from a file and replays a file."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        fakes.take_over(monkeypatch)
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("scoring", "scoring.parts"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / "scoring").mkdir()
        (tmp_path / "scoring" / "__init__.py").write_text("from scoring.parts import reward\n")
        (tmp_path / "scoring" / "parts.py").write_text("def reward(problem, reply, grade):\n    return 0.5\n")
        rows = [{"problem": f"{i} + 1", "answer": str(i + 1)} for i in range(6)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "roots.jsonl").write_text('{"text": "Add."}\n{"text": "Count."}\n')
        line = {"conversation": [{"role": "user", "content": "x"}], "reply": "y", "iteration": 1}
        (tmp_path / "replies.jsonl").write_text(json.dumps(line) + "\n")
        (tmp_path / "weights.safetensors").write_bytes(b"weights")
        files = {"weights.safetensors": tmp_path / "weights.safetensors"}

        def load(*args, **kwargs):
            return dataclasses.replace(fakes.load_pretrained(*args, **kwargs), files=files)

        monkeypatch.setattr("espl_jax.run.weights.load_pretrained", load)
        return tmp_path

    def resumed(self, folder, **changes):
        settings = {
            "mode": "evolution",
            "data__train": str(folder / "train.jsonl"),
            "data__validation": "",
            "data__validation_count": 1,
            "data__test": "",
            "environment__reward": "scoring:reward",
            "population__text": "",
            "population__start_from": str(folder / "roots.jsonl"),
            "reflection__reflector": "replay",
            "reflection__replay": str(folder / "replies.jsonl"),
        }
        config = fakes.config(**settings, **changes)
        with WorkDir(folder / "run", config.to_dict(), may_change=state.MAY_CHANGE) as workdir:
            run = state.restore(workdir, config, parts.assemble(config))
            state.save(workdir, dataclasses.replace(run, iteration=run.iteration + 1))

    def test_what_was_replaced_is_refused_by_name_or_allowed_and_logged(self, folder, monkeypatch):
        self.resumed(folder)
        warnings = []
        monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
        for field, name, edit in (
            ("data.train", "train.jsonl", lambda text: text.replace("5 + 1", "5 + 2")),
            ("environment.reward", "scoring/parts.py", lambda text: text.replace("0.5", "0.25")),
            ("model.source", "weights.safetensors", str.upper),
            ("population.start_from", "roots.jsonl", lambda text: text + '{"text": "Sum."}\n'),
            ("reflection.replay", "replies.jsonl", lambda text: text * 2),
        ):
            (folder / name).write_text(edit((folder / name).read_text()))
            with pytest.raises(ValueError) as error:
                self.resumed(folder)
            said = str(error.value)
            names = ["problems of train"] if field == "data.train" else [name]
            changed = f"{', '.join(names)} changed since the checkpoint of iteration "
            assert said.startswith(f"{field}='") and changed in said
            assert said.endswith("resume with --config.resume.changed_inputs=allow")
            assert not warnings
            self.resumed(folder, resume__changed_inputs="allow")
            assert len(warnings) == 1 and warnings.pop().startswith(said.partition(";")[0])
            # What was allowed is what the next checkpoint compares with.
            self.resumed(folder)
            assert not warnings

    def test_weights_evaluated_on_another_base_are_told(self, folder, monkeypatch):
        self.resumed(folder)
        warnings = []
        monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
        read_run(folder / "run")
        assert not warnings
        (folder / "weights.safetensors").write_bytes(b"others!")
        read_run(folder / "run")
        assert len(warnings) == 1 and "model.source='smollm2': weights.safetensors changed" in warnings[0]
