import concurrent.futures
import json
import multiprocessing
import shutil

import numpy as np
import pytest

from espl_jax.environments.retrievers import index, index_cache
from espl_jax.environments.retrievers.load import Bm25, open_retriever
from espl_jax.types import Passage

PASSAGES = [Passage(f"Tree {i}", f"Its number is {i}, and it is {'tall' * (i % 7 == 0)}.") for i in range(50)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "trees.jsonl"
    write(path, PASSAGES)
    return path


def write(path, passages):
    lines = [json.dumps({"title": passage.title, "text": passage.text}) for passage in passages]
    path.write_text("\n".join(lines))


def search(path):
    return open_retriever(str(path), 1.0).search(["tall", "number 31", ""], 3)


def entries():
    return list(index_cache.cache_folder().iterdir())


def no_more_building(monkeypatch):
    def refuse(*args):
        raise AssertionError("built again")

    monkeypatch.setattr(index, "build", refuse)


FOUND = [[PASSAGES[0], PASSAGES[7], PASSAGES[14]], [PASSAGES[31], PASSAGES[1], PASSAGES[2]], []]
"""The numbers of those that are not tall are the shortest, and passages of one score come in their order."""


def test_built_once(path, monkeypatch):
    assert search(path) == FOUND
    no_more_building(monkeypatch)
    assert search(path) == FOUND
    bm25, offsets = index_cache.open_cached(path)
    assert all(isinstance(bm25.scores[name], np.memmap) for name in ("data", "indices", "indptr"))
    assert isinstance(offsets, np.memmap)
    assert len(entries()) == 1


def test_memory_and_disk_find_the_same(path):
    queries = ["tall", "number 31", "tree 7 number"]
    from_file, from_memory = Bm25.open(path), Bm25(PASSAGES)
    assert len(from_file) == len(from_memory) == 50
    assert from_file.search(queries, 60) == from_memory.search(queries, 60)
    for query in queries:
        assert from_file.rank(query, 60) == from_memory.rank(query, 60)


def test_changed_file_is_indexed_anew(path):
    search(path)
    new = Passage("New", "A tall one.")
    write(path, [*PASSAGES, new])
    assert search(path)[0][0] == new
    assert len(entries()) == 2


@pytest.mark.parametrize("harm", ["cut", "remove", "junk"])
@pytest.mark.parametrize(
    "name",
    ["params.index.json", "offsets.npy", "data.csc.index.npy", "indptr.csc.index.npy", "vocab.index.json"],
)
def test_damaged_entry_is_built_anew(path, monkeypatch, name, harm):
    wanted = search(path)
    (entry,) = entries()
    damaged = entry / name
    if harm == "remove":
        damaged.unlink()
    elif harm == "cut":
        damaged.write_bytes(damaged.read_bytes()[:-1])
    else:
        damaged.write_bytes(b"junk")
    assert search(path) == wanted
    no_more_building(monkeypatch)
    assert search(path) == wanted
    assert entries() == [entry]


def test_entry_of_files_that_do_not_belong_together(path, tmp_path):
    wanted = search(path)
    (entry,) = entries()
    other = tmp_path / "other.jsonl"
    write(other, PASSAGES[:9])
    search(other)
    (of_other,) = set(entries()) - {entry}
    for name in ("offsets.npy", "indices.csc.index.npy"):
        shutil.copy(of_other / name, entry / name)
        assert search(path) == wanted


def test_open_index_survives_the_removal_of_its_entry(path):
    retriever = open_retriever(str(path), 1.0)
    wanted = retriever.search(["tall"], 3)
    shutil.rmtree(index_cache.cache_folder())
    assert retriever.search(["tall"], 3) == wanted


def test_folder_that_cannot_be_written(path, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ESPL_JAX_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be cached"):
        assert search(path)[0] == FOUND[0]


def test_error_while_building_leaves_nothing(path):
    path.write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        search(path)
    assert not index_cache.cache_folder().exists()


def test_processes_that_begin_at_once(path):
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(search, [path] * 4))
    assert found == [FOUND] * 4
    assert len(entries()) == 1
