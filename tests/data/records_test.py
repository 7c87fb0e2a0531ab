from decimal import Decimal

import pytest

from espl_jax.data.records import read_problems


def read(*records, source="some set", **options):
    return read_problems(((f"row {i}", record) for i, record in enumerate(records, 1)), source, **options)


@pytest.mark.parametrize(
    ("answer", "text", "aliases"),
    [
        (42, "42", ()),
        (42.0, "42", ()),
        (-0.5, "-0.5", ()),
        (10**400, "1" + "0" * 400, ()),
        (Decimal("1.50"), "1.50", ()),
        (["42"], "42", ()),
        ([7], "7", ()),
        (["Paris", "Lutetia", "Paris"], "Paris", ("Lutetia",)),
        ("x\n#### 3", "3", ()),
    ],
)
def test_answers(answer, text, aliases):
    (problem,) = read({"problem": "p", "answer": answer}).problems
    assert (problem.answer, problem.aliases) == (text, aliases)


@pytest.mark.parametrize("answer", [None, True, [], [None], [["a", "b"]], {"a": 1}, float("inf"), " ", [""]])
def test_answers_that_are_none(answer):
    with pytest.raises(ValueError, match=r"some set, row 1: the field 'answer' is .*; it must be non-blank"):
        read({"problem": "p", "answer": answer})


def test_lists_of_one_may_be_nested_deeply():
    answer = 1
    for _ in range(10_000):
        answer = [answer]
    (problem,) = read({"problem": "p", "answer": [answer, 2]}).problems
    assert (problem.answer, problem.aliases) == ("1", ("2",))


def test_fields_reach_into_dicts_and_lists():
    record = {"prompt": [{"content": "p", "role": "user"}], "reward": {"gold": 1}, "a.b": "k"}
    fields = {"text": "prompt.0.content", "answer": "reward.gold", "id": "a.b"}
    (problem,) = read(record, fields=fields).problems
    assert (problem.id, problem.text, problem.answer) == ("k", "p", "1")
    for field, there in [
        ("prompt.0.text", r"the fields of 'prompt.0' are \['content', 'role'\]"),
        ("prompt.1.content", "the value of 'prompt' is a list of 1"),
        ("reward.gold.x", "the value of 'reward.gold' is 1"),
        ("other", r"the fields are \['a.b', 'prompt', 'reward'\]"),
    ]:
        message = f"some set, row 1: no field '{field}'; {there}; name the field .* text=FIELD"
        with pytest.raises(ValueError, match=message):
            read(record, fields=fields | {"text": field})


def test_ids():
    records = [{"id": 1, "problem": "a", "answer": 1}, {"id": "x", "problem": "b", "answer": 1}]
    assert [p.id for p in read(*records, prefix="name-test").problems] == ["name-test-1", "x"]
    hashed = [p.id for p in read(*records, fields={"id": ""}).problems]
    same = [{**record, "id": 5} for record in records]
    assert hashed == [p.id for p in read(*same, fields={"id": ""}).problems]
    with pytest.raises(ValueError, match=r"row 2: same id as in row 1 .*option id="):
        read(*same)
    with pytest.raises(ValueError, match="empty name for answer"):
        read(*records, fields={"answer": ""})


def test_repeated_statements():
    one, same, other = ({"problem": " p ", "answer": a} for a in ("1", 1, "2"))
    new = {"problem": "q", "answer": "1"}
    with pytest.raises(ValueError, match=r"some set, row 2: same text as in row 1 .*repeats=merge"):
        read(one, same, new)
    assert [p.text for p in read(one, same, new, repeats="merge").problems] == ["p", "q"]
    message = "row 3: same text as in row 1, but a different answer, '2' instead of '1'"
    with pytest.raises(ValueError, match=message):
        read(one, new, other, repeats="merge")
    assert [p.answer for p in read(one, new, other, repeats="first").problems] == ["1", "1"]
    with pytest.raises(ValueError, match="unknown repeats='last'; choose one of refuse, merge, first"):
        read(one, repeats="last")


def test_nothing_is_refused():
    with pytest.raises(ValueError, match="some set is empty"):
        read()
