import json

import pytest

from espl_jax.data.jsonl import read_jsonl
from espl_jax.data.load import load


def write(tmp_path, *records, name="some.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def test_usual_fields_are_found(tmp_path):
    path = write(
        tmp_path,
        {"id": 7, "problem": "one", "answer": 12},
        "",
        {"id": "b", "question": "two\u2028lines", "answer": "x = 3\n#### 1,234 "},
    )
    one, two = read_jsonl(path).problems
    assert (one.id, one.text, one.answer) == ("some-7", "one", "12")
    assert (two.id, two.text, two.answer) == ("b", "two\u2028lines", "1,234")


def test_ids_from_text_are_stable_and_distinct(tmp_path):
    records = [{"problem": "one", "answer": "1"}, {"problem": "two", "answer": "1"}]
    first = read_jsonl(write(tmp_path, *records))
    again = read_jsonl(write(tmp_path, *reversed(records), name="other.jsonl"))
    assert {p.text: p.id for p in first.problems} == {p.text: p.id for p in again.problems}
    assert first.problems[0].id == "7692c3ad3540"  # the first 12 digits of sha256("one")


def test_field_names_can_be_given(tmp_path):
    path = write(tmp_path, {"problem": "not this", "prompt": "this", "gold": "5", "key": "k"})
    (problem,) = read_jsonl(path, {"text": "prompt", "answer": "gold", "id": "key"}).problems
    assert (problem.id, problem.text, problem.answer) == ("k", "this", "5")
    with pytest.raises(ValueError, match=r"fields=\['question'\]"):
        read_jsonl(path, {"question": "prompt"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"problem": "a", "solution": "3"},
            r"line 2: no field 'answer'; the fields are \['problem', 'solution'\]",
        ),
        (
            {"text": "a", "answer": "3"},
            r"line 2: no field 'problem' or 'question'; the fields are \['answer', 't",
        ),
        ({"problem": "a", "answer": None}, "line 2: the field 'answer' is None"),
        ({"problem": "a", "answer": True}, "line 2: the field 'answer' is True"),
        ({"problem": " ", "answer": "1"}, "line 2: the field 'problem' is ' '"),
        ({"problem": "a", "answer": "so ####"}, "line 2: the answer has nothing after ####"),
        ("[1]", "line 2: a list"),
        ('{"problem": ', "line 2: not JSON"),
        ({"problem": "first", "answer": "2"}, "line 2: same text as in line 1"),
        ({"problem": "first", "answer": "1", "id": "b"}, "line 2: same text as in line 1"),
        ({"problem": "new", "answer": "2", "id": "a7937b64b8ca"}, "line 2: same id as in line 1"),
        ({"problem": "new", "answer": float("nan")}, "line 2: the field 'answer' is nan"),
        ({"problem": "a \ud83c", "answer": "1"}, r"'problem' has '\\ud83c' at character 3, half of a surr"),
        (
            {"problem": "a", "answer": ["1", "\udf78"]},
            "line 2: the field 'answer' has .* half of a surrogate",
        ),
        ('{"problem": "a", "answer": ' + "9" * 5000 + "}", "line 2: the field 'answer' is a number of more"),
        ({"problem": "a", "answer": 1e300}, r"line 2: the field 'answer' is the float 1e\+300, .* as text"),
        ('{"problem": "a", "answer": 0.1234567890123456789}', "is the number 0.1234567890123456789, "),
        ('{"problem": "a", "answer": [1, [1E-400]]}', "line 2: .* number 1E-400, which .* give it as text"),
        ('{"problem": "a", "answer": 1e-99999999999999999999}', "line 2: .* number 1e-9999999999"),
        ('{"problem": "a", "answer": -1E400}', "line 2: the field 'answer' is the number -1E400, "),
        ('{"problem": "a", "answer": 0.' + "3" * 5000 + "}", "line 2: .* number 0.333.*, which a float"),
        ('{"problem": 9007199254740993.0, "answer": 1}', "line 2: the field 'problem' is the number 900719"),
        ('{"problem": "a", "answer": ' + "[" * 100_000, "line 2: not JSON .nested too deeply"),
        ({"problem": ["a", "b"], "answer": "1"}, r"line 2: the field 'problem' is \['a', 'b'\]"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, line, message):
    path = write(tmp_path, {"problem": "first", "answer": "1"}, line)
    with pytest.raises(ValueError, match=message) as error:
        read_jsonl(path)
    assert "some.jsonl" in str(error.value)


def test_numbers_that_are_not_of_the_problem_may_be_huge(tmp_path):
    path = write(tmp_path, '{"problem": "a", "answer": 12.50, "p": 1e-999, "hash": ' + "9" * 5000 + "}")
    assert read_jsonl(path).problems[0].answer == "12.5"


def test_unusable_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        read_jsonl(write(tmp_path, "", ""))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_jsonl(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "é", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl")
    with pytest.raises(ValueError, match="no field 'key'"):
        read_jsonl(write(tmp_path, {"problem": "a", "answer": "1"}), {"id": "key"})


def test_real_problems(shared):
    hmmt = load(str(shared / "data" / "hmmt_feb_2025.jsonl"))
    assert len(hmmt) == 30
    assert (hmmt.problems[0].id, hmmt.problems[0].answer) == ("hmmt-feb-2025-01", "103")
    gsm8k = load(str(shared / "data" / "gsm8k_test.jsonl"))
    assert len(gsm8k) == 1319
    assert [p.answer for p in gsm8k.problems[:2]] == ["18", "3"]
    assert not any("#" in p.answer for p in gsm8k.problems)
