"""What the measurement of reflections counts, on replies written by hand."""

import json
import sys

from espl_jax.evolution.templates import BUILT_IN
from espl_jax.types import Reply
from experiments import reflections

SHOWN = BUILT_IN.load("critique").system.split(". ")[1]
REPLIES = (
    Reply(text=r"ADD: Write the answer as \boxed{...}."),
    Reply(text="ADD: Be exact with every digit."),
    Reply(text=f"ADD: {SHOWN}."),
    Reply(text="ADD: Write the answer in a bo", ended=False),
    Reply(text="I cannot help with that."),
)


class Scripted:
    def __init__(self, **settings):
        pass

    def ask(self, questions):
        assert len(questions) == len(REPLIES)
        assert all("answer in a box" in question.conversation[-1]["content"] for question in questions)
        return list(REPLIES)


def test_counts_and_what_is_not_measured_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "reflections.json"
    monkeypatch.setattr(reflections, "LocalReflector", Scripted)
    monkeypatch.setattr(reflections, "load_pretrained", lambda *_, **__: None)
    arguments = [f"--out={path}", "--count=5", "--cells=lines, none, new templates, feedback alone"]
    monkeypatch.setattr(sys, "argv", ["reflections", *arguments])
    reflections.main()
    ((key, cell),) = json.loads(path.read_text()).items()
    assert key == "smollm2 | lines, none, new templates, feedback alone"
    assert [cell[name] for name in ("count", "ended", "read", "echoes", "accepted", "passes_on")] == [
        5,
        4,
        3,
        1,
        2,
        1,
    ]
    said = " ".join(capsys.readouterr().out.split())
    assert "| smollm2 | lines, none, new templates, feedback alone | 5 | 4 | 3 | 1 | 2 | 1 |" in said

    monkeypatch.setattr(reflections, "LocalReflector", None)  # raises if it is called
    reflections.main()
    assert json.loads(path.read_text()) == {key: cell}
