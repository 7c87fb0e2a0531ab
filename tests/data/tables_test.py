import functools

import pyarrow as pa
import pytest
from pyarrow import parquet

from espl_jax.data import tables
from espl_jax.data.load import load
from tests.support.dataset_hub import dapo, statement

DAPO = "text=prompt.0.content,answer=reward_model.ground_truth"


def write(tmp_path, rows, name="some.parquet"):
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=50)
    return tmp_path / name


def test_a_file_of_dapo_is_read_as_the_hub_is(tmp_path):
    file = write(tmp_path, dapo(count=60, copies=4))
    whole = load(f"{file}:{DAPO},repeats=first")
    assert [(p.text, p.answer) for p in whole.problems] == [
        (statement("harbor", i), str(i + 1)) for i in range(60)
    ]
    assert whole.name == "some.parquet"
    with pytest.raises(ValueError, match=r"some.parquet, row 61: same text as in row 1"):
        load(f"{file}:{DAPO}")
    message = "row 241: same text as in row 1, but a different answer, '17' instead of '1'"
    with pytest.raises(ValueError, match=message):
        load(f"{file}:{DAPO},repeats=merge")


def test_rows_that_repeat_never_become_python_objects(tmp_path, monkeypatch):
    seen = []
    read = tables.read_problems

    def spy(records, *arguments):
        seen.extend(records)
        return read(seen, *arguments)

    monkeypatch.setattr(tables, "read_problems", spy)
    load(f"{write(tmp_path, dapo(count=60, copies=4))}:{DAPO},repeats=first")
    assert len(seen) == 61  # one of them has another answer
    assert seen[-1][0] == "row 241" and set(seen[0][1]) == {"prompt", "reward_model"}


@pytest.mark.parametrize(
    ("prompts", "answer"),
    [(["a"], "1"), (["a"], ["1", "2"]), (["a", "b"], 1.0)],
    ids=["plain", "lists of answers", "lists of different lengths"],
)
def test_repeats_of_any_type_are_merged(tmp_path, prompts, answer):
    rows = [{"prompt": [{"content": text} for text in texts], "answer": answer} for texts in (["a"], prompts)]
    rows.append({"prompt": [{"content": "c"}] * len(prompts), "answer": answer})
    problems = load(f"{write(tmp_path, rows)}:text=prompt.0.content,repeats=merge").problems
    assert [(p.text, p.answer) for p in problems] == [("a", "1"), ("c", "1")]


def test_errors_name_the_file_and_its_columns(tmp_path):
    file = write(tmp_path, [{"problem": "a", "gold": 1, "id": None}])
    message = r"some.parquet: no field 'answer'; the fields are \['gold', 'id', 'problem'\]; .*answer=FIELD"
    with pytest.raises(ValueError, match=message):
        load(str(file))
    with pytest.raises(ValueError, match=r"some.parquet, row 1: the field 'id' is None"):
        load(f"{file}:answer=gold")
    assert len(load(f"{file}:answer=gold,id=")) == 1
    with pytest.raises(ValueError, match="no field 'key'; the fields are"):
        load(f"{file}:answer=gold,id=key")
    with pytest.raises(FileNotFoundError, match=r"data: .*none.parquet does not exist"):
        load(str(tmp_path / "none.parquet"))
    (tmp_path / "bad.parquet").write_text("PAR0")
    with pytest.raises(ValueError, match=r"bad.parquet: cannot be read as parquet"):
        load(str(tmp_path / "bad.parquet"))
    empty = pa.table({"problem": pa.array([], pa.string()), "answer": pa.array([], pa.string())})
    parquet.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=r"empty.parquet is empty"):
        load(str(tmp_path / "empty.parquet"))


def test_rows_that_cannot_be_read_are_named(tmp_path):
    texts = pa.array([b"a", b"b", b"\xed\xa0\xbc"]).view(pa.string())  # the last is half a surrogate pair
    parquet.write_table(pa.table({"problem": texts, "answer": [1.0, 2.0, 3.0]}), tmp_path / "some.parquet")
    for repeats in ("refuse", "first"):
        message = "some.parquet, row 3: the field 'problem' cannot be read .*utf-8.*; correct the data"
        with pytest.raises(ValueError, match=message):
            load(f"{tmp_path / 'some.parquet'}:repeats={repeats}")
    file = write(tmp_path, [{"problem": "a", "answer": 1e300}])
    with pytest.raises(ValueError, match=r"row 1: the field 'answer' is the float 1e\+300"):
        load(str(file))
    nested = functools.reduce(lambda inner, _: [inner], range(100), "a")
    with pytest.raises(ValueError, match=r"some.parquet: cannot be read as parquet .*nested"):
        load(str(write(tmp_path, [{"problem": "a", "answer": nested}])))
