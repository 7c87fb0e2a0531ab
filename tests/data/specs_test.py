from pathlib import Path

import pytest

from espl_jax.data import specs
from espl_jax.data.load import load
from espl_jax.data.specs import parse


@pytest.mark.parametrize(
    ("spec", "kind", "place", "options", "name"),
    [
        ("a.jsonl", "jsonl", "a.jsonl", {}, "a"),
        ("~/d/a.parquet:count=5, skip=2", "parquet", "~/d/a.parquet", {"count": "5", "skip": "2"}, "a"),
        (r"C:\data\a.jsonl", "jsonl", r"C:\data\a.jsonl", {}, None),
        (r"C:\data\a.jsonl:text=q", "jsonl", r"C:\data\a.jsonl", {"text": "q"}, None),
        ("a:b=c.jsonl", "jsonl", "a:b=c.jsonl", {}, "a:b=c"),
        ("a:b=c,d.jsonl:answer=e=f", "jsonl", "a:b=c,d.jsonl", {"answer": "e=f"}, "a:b=c,d"),
        ("old.jsonl:2.jsonl:id=", "jsonl", "old.jsonl:2.jsonl", {"id": ""}, "old.jsonl:2"),
        ("hub:org/name", "hub", "org/name", {}, "name"),
        ("hub:o/n.jsonl", "hub", "o/n.jsonl", {}, "n.jsonl"),
        (
            "hub:o/n:config=main,split=train[:10],revision=refs/pr/1",
            "hub",
            "o/n",
            {"config": "main", "split": "train[:10]", "revision": "refs/pr/1"},
            "n-main-train[:10]",
        ),
        ("encyclopedia", "encyclopedia", "", {}, "encyclopedia"),
        ("encyclopedia:hops=1-2", "encyclopedia", "", {"hops": "1-2"}, "encyclopedia"),
    ],
)
def test_one_source(spec, kind, place, options, name):
    (source,) = parse(spec)
    assert (source.kind, source.place, source.options, source.spec) == (kind, place, options, spec)
    assert name is None or source.name == name


def test_several_sources_and_their_files():
    sources = parse("a.jsonl + hub:org/name:split=test  +  ~/b c+d.parquet:count=1")
    assert [source.place for source in sources] == ["a.jsonl", "org/name", "~/b c+d.parquet"]
    assert sources[2].number("count") == 1 and sources[2].number("skip") is None
    assert specs.files("a.jsonl + hub:o/n + ~/b.parquet") == (Path("a.jsonl"), Path.home() / "b.parquet")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "sums.txt",
            "data.test='sums.txt': not a data spec; give the path of a .jsonl or .parquet file, hub:",
        ),
        ("a.jsonl + b", "data.test='b': not a data spec"),
        ("a.jsonl + ", r"data.test='a.jsonl \+': not a data spec"),
        ("hub:gsm8k", "data.test='hub:gsm8k': not a data spec"),
        ("hub:/etc/a.jsonl", "not a data spec"),
        (
            "a.jsonl:split=test",
            "invalid or repeated option 'split=test'; options are count, skip, shuffle, repeats, text",
        ),
        (
            "hub:o/n:count=-1",
            "invalid or repeated option 'count=-1'; options are split, config, revision, count",
        ),
        ("hub:o/n:count=ten", "invalid or repeated option 'count=ten'.*integer numbers"),
        ("hub:o/n:count", "invalid or repeated option 'count'"),
        ("hub:o/n:", "invalid or repeated option ''"),
        ("hub:o/n:count=1,count=2", "invalid or repeated option 'count=2'"),
    ],
)
def test_what_is_not_understood_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse(spec, "data.test")


def test_options_of_files_choose_and_name(tmp_path):
    file = tmp_path / "a=b.jsonl"
    file.write_text("".join(f'{{"q": {{"t": ["say {i}"]}}, "gold": {i}}}\n' for i in range(9)))
    options = "text=q.t.0,answer=gold"
    fields = {"text": "wrong", "answer": "gold"}  # the option goes before it
    problems = load(f"{file}:text=q.t.0,skip=2,count=3", fields=fields).problems
    assert [(p.text, p.answer) for p in problems] == [(f"say {i}", str(i)) for i in (2, 3, 4)]
    parts = f"{file}:{options},count=2 + {file}:{options},skip=2 + addition:digits=1,count=3"
    assert len(load(parts)) == 12
    with pytest.raises(ValueError, match="has the same text as"):
        load(f"{file}:{options} + {file}:{options}")
    with pytest.raises(
        ValueError, match=r"a=b.jsonl, line 1: no field 'q.t.1'; the value of 'q.t' is a list"
    ):
        load(f"{file}:text=q.t.1,answer=gold")
