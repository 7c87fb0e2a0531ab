"""What was added to the journal is found again, whatever a kill did to the end of the file."""

import errno
import json
import os
import threading

import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_jax.reflectors.journal import Journal, digest
from espl_jax.storage import durable

ENTRIES = [
    {"iteration": 1, "reply": "one\nline", "usage": {"prompt_tokens": 3}},
    {"iteration": 1, "reply": None, "failure": "timeout"},
    {"iteration": 2, "reply": "drei ✓ \u2028 ?"},
]


def filled(path):
    with Journal(path) as journal:
        for entry in ENTRIES:
            journal.add(digest(entry), entry)
    return path


def found(path):
    with Journal(path) as journal:
        return [journal.find(digest(entry)) for entry in ENTRIES]


def test_entries_are_found_at_once_and_in_another_process(tmp_path):
    path = tmp_path / "replies.jsonl"
    with Journal(path) as journal:
        for entry in ENTRIES:
            assert journal.find(digest(entry)) is None
            journal.add(digest(entry), entry)
            assert journal.find(digest(entry)) == {"key": digest(entry), **entry}
            assert len(path.read_bytes().splitlines()) == ENTRIES.index(entry) + 1
    assert found(path) == [{"key": digest(entry), **entry} for entry in ENTRIES]


def test_an_entry_is_on_the_disk_before_add_returns(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), fsync(file)))
    with Journal(tmp_path / "replies.jsonl") as journal:
        synced.clear()
        journal.add("k", ENTRIES[0])
        assert synced == [journal.path.stat().st_size]


def test_a_key_does_not_depend_on_the_order_of_names():
    assert digest({"a": 1, "b": [{"c": 2, "d": "ü"}]}) == digest({"b": [{"d": "ü", "c": 2}], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2}) != digest({"a": "2"})


def test_every_cut_keeps_the_whole_lines_and_what_comes_after(tmp_path):
    whole = filled(tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        expected = [{"key": digest(entry), **entry} for entry in ENTRIES]
        with Journal(path) as journal:
            assert [journal.find(digest(entry)) for entry in ENTRIES] == [
                *expected[:lines],
                *[None] * (3 - lines),
            ]
            for entry in ENTRIES[lines:]:
                journal.add(digest(entry), entry)
        assert path.read_bytes() == whole


def test_a_cut_is_logged(tmp_path, caplog):
    path = filled(tmp_path / "replies.jsonl")
    path.write_bytes(path.read_bytes()[:-4])
    logging.use_python_logging()
    with caplog.at_level("WARNING", "absl"):
        Journal(path).close()
    assert "unfinished line" in caplog.text and str(path) in caplog.text


@pytest.mark.parametrize("damage", [b"{", b"[1]", b'{"reply": "x"}', b'{"key": 3}', b"", b"\0" * 9, b"\xff"])
def test_a_damaged_line_is_named(tmp_path, damage):
    path = filled(tmp_path / "replies.jsonl")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], damage, *lines[1:]]))
    with pytest.raises(ValueError, match=r"line 2 is damaged.*sed -i 2d"):
        Journal(path)
    path.write_bytes(b"\n".join(lines))  # what the message says to do
    assert None not in found(path)


def test_entries_of_many_threads_do_not_interleave(tmp_path):
    path = tmp_path / "replies.jsonl"
    with Journal(path) as journal:

        def add(thread):
            for number in range(20):
                journal.add(f"{thread}.{number}", {"reply": f"{thread}" * 3_000})

        threads = [threading.Thread(target=add, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Journal(path) as journal:
        for thread in range(4):
            for number in range(20):
                assert journal.find(f"{thread}.{number}")["reply"] == f"{thread}" * 3_000


def test_a_full_disk_is_explained_and_leaves_the_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "replies.jsonl"
    with Journal(path) as journal:
        journal.add("first", ENTRIES[0])
        pwrite = os.pwrite

        def full(file, content, place):
            if len(content) > 20:
                return pwrite(file, content[:20], place)
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match="the disk is full"):
                journal.add("second", {"reply": "x" * 8})
        assert journal.find("second") is None
        journal.add("third", ENTRIES[1])
    assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == ["first", "third"]


def test_a_failed_write_cuts_back_to_the_last_entry(tmp_path, monkeypatch):
    with Journal(tmp_path / "replies.jsonl") as journal:
        journal.add("first", ENTRIES[0])
        length = durable.size(journal.path)

        def fails(file):
            raise OSError(errno.EIO, "the disk is gone")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails)
            with pytest.raises(OSError, match="the disk is gone"):
                journal.add("second", ENTRIES[1])
        assert durable.size(journal.path) == length


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=40)
@given(entries=st.lists(st.dictionaries(st.text(min_size=4), values), max_size=6), cut=st.integers(0, 300))
def test_any_entries_and_any_cut(tmp_path_factory, entries, cut):
    path = tmp_path_factory.mktemp("journal") / "replies.jsonl"
    with Journal(path) as journal:
        for number, entry in enumerate(entries):
            journal.add(str(number), entry)
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - cut)])
    kept = path.read_bytes().count(b"\n")
    with Journal(path) as journal:
        for number, entry in enumerate(entries):
            expected = {"key": str(number), **entry} if number < kept else None
            assert journal.find(str(number)) == expected
