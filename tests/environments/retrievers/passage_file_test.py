import json

import pytest

from espl_jax.environments.retrievers.load import Bm25, RetrievalError
from espl_jax.environments.retrievers.passage_file import PassageFile, read_passage, scan
from espl_jax.types import Passage


@pytest.mark.parametrize(
    ("record", "passage"),
    [
        ({"title": "Gate", "text": "It is open."}, Passage("Gate", "It is open.")),
        ({"id": 7, "text": "It is open."}, Passage("", "It is open.")),
        ({"title": None, "text": " It is open.\n"}, Passage("", "It is open.")),
        ({"id": "7", "contents": '"Gate"\nIt is\nopen.'}, Passage("Gate", "It is\nopen.")),
        ({"contents": 'Gate "of" iron\nIt is open.'}, Passage('Gate "of" iron', "It is open.")),
        ({"contents": "It is open."}, Passage("", "It is open.")),
        ({"contents": '"A"\nB', "text": "C", "title": "D"}, Passage("D", "C")),
        ({"title": "Gate", "text": ""}, Passage("Gate", "")),
        ({"text": "half \ud800 pair"}, Passage("", "half ? pair")),
    ],
)
def test_forms(record, passage):
    assert read_passage(record) == passage


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not JSON"),
        ("[" * 100_000, "line 3: not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "line 3: the field 'text'"),
        ('"text"', "line 3: a str, but a passage must be one JSON object"),
        ('{"body": "x", "id": 1}', r"line 3: no field 'text' or 'contents'; the fields are \['body', 'id'\]"),
        ('{"text": 5}', "line 3: the field 'text' is 5, but must be text"),
        ('{"text": "x", "title": ["y"]}', "line 3: the field 'title'"),
        ('{"contents": {"a": 1}}', "line 3: the field 'contents'"),
        ('{"text": " ", "title": ""}', "line 3: the passage is blank"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "passages.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        Bm25.open(path)
    assert str(path) in str(caught.value)


def test_not_utf8(tmp_path):
    path = tmp_path / "passages.jsonl"
    path.write_bytes('{"text": "naïve"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        Bm25.open(path)


def test_passages_are_read_where_they_lie(tmp_path):
    path = tmp_path / "passages.jsonl"
    texts = ["naïve", "日本", "\u2028 line", "x" * 100_000, "last"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(lines).encode())
    offsets = [offset for offset, _ in scan(path)]
    passages = PassageFile(path, [*offsets, path.stat().st_size])
    assert len(passages) == 5
    for number in (4, 0, 2, 3, 1):
        assert passages[number] == Passage("", texts[number].strip())


def test_file_that_changes_while_it_is_open(tmp_path):
    path = tmp_path / "passages.jsonl"
    path.write_text('{"text": "one tree"}\n{"text": "two trees"}\n')
    bm25 = Bm25.open(path)
    with open(path, "r+") as file:
        file.write("garbage at the start of it")
    with pytest.raises(RetrievalError, match="has changed since it was indexed"):
        bm25.search(["one"], 1)
