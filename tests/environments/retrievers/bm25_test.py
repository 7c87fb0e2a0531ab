import collections
import concurrent.futures
import math
import random
import subprocess
import sys

import pytest

from espl_jax.environments.retrievers.index import K1, B
from espl_jax.environments.retrievers.load import Bm25, open_retriever
from espl_jax.environments.retrievers.words import Stems, stems_of
from espl_jax.types import Passage

TREES = [Passage("Oak", "A tall tree."), Passage("Elm", "A tree near the old tree."), Passage("", "A stone.")]


def test_scores_by_hand():
    """Documents of 3, 5 and 1 searched words: oak tall tree, elm tree near old tree, stone."""
    bm25 = Bm25(TREES)
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    once = idf * 1 / (1 + 0.9 * (0.6 + 0.4 * 3 / 3))
    twice = idf * 2 / (2 + 0.9 * (0.6 + 0.4 * 5 / 3))
    (first, high), (second, low) = bm25.rank("trees", 5)
    assert (first, second) == (1, 0)
    assert high == pytest.approx(twice, rel=1e-5)
    assert low == pytest.approx(once, rel=1e-5)
    assert bm25.search(["oak", "STONES"], 2) == [[TREES[0]], [TREES[2]]]


def test_against_a_plain_implementation():
    rng = random.Random(0)
    words = [f"w{i}x" for i in range(40)]
    passages = [
        Passage("", " ".join(rng.choices(words, range(40, 0, -1), k=rng.randint(1, 30)))) for _ in range(200)
    ]
    documents = [collections.Counter(stems_of(passage.text, Stems())) for passage in passages]
    mean = sum(sum(document.values()) for document in documents) / len(documents)

    def score(query, document):
        total = 0.0
        for word in query:
            having = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            times = document[word]
            total += idf * times / (times + K1 * (1 - B + B * sum(document.values()) / mean))
        return total

    bm25 = Bm25(passages)
    for _ in range(20):
        query = rng.choices([*words, "unknown"], k=rng.randint(1, 5))
        scores = [score([word for word in query if word in words], document) for document in documents]
        wanted = sorted((i for i in range(200) if scores[i] > 0), key=lambda i: (-round(scores[i], 5), i))
        for count in (1, 7, 500):
            ranked = bm25.rank(" ".join(query), count)
            assert [number for number, _ in ranked] == wanted[:count]
            assert [s for _, s in ranked] == pytest.approx([scores[i] for i in wanted[:count]], rel=1e-4)


def test_ties_come_in_the_order_of_passages():
    passages = [Passage("", f"{'apple' if i % 3 else 'pear'} {'tree' * (i == 50)}") for i in range(100)]
    bm25 = Bm25(passages)
    apples = [i for i in range(100) if i % 3 and i != 50]
    assert [number for number, _ in bm25.rank("apple", 10)] == apples[:10]
    assert [number for number, _ in bm25.rank("apple", 100)] == [*apples, 50]


@pytest.mark.parametrize("query", ["", "  \n", "the of", "unknown", "?!", "\x00\ud800"])
def test_queries_that_find_nothing(query):
    assert Bm25(TREES).search([query, "oak"], 3) == [[], [TREES[0]]]


def test_no_queries_and_long_ones():
    bm25 = Bm25(TREES)
    assert bm25.search([], 3) == []
    assert bm25.search(["oak " * 100_000], 3) == [[TREES[0]]]


@pytest.mark.parametrize("passages", [[], [Passage("", "...")], [Passage("The", "of")]])
def test_nothing_to_search(passages):
    with pytest.raises(ValueError, match="nothing to search"):
        Bm25(passages)


def test_count_below_one():
    with pytest.raises(ValueError, match="count=0"):
        Bm25(TREES).search(["oak"], 0)


def test_from_several_threads():
    rng = random.Random(1)
    passages = [Passage(f"n{i}", " ".join(rng.choices("abcdefgh", k=9))) for i in range(500)]
    bm25 = Bm25(passages)
    queries = [" ".join(rng.choices("abcdefgh", k=3)) for _ in range(64)]
    alone = [bm25.search([query], 5) for query in queries]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: bm25.search([query], 5), queries)) == alone


@pytest.mark.parametrize("first", ["", "import jax.lax"])
def test_jax_is_left_alone(first):
    """bm25s would import it and take its devices. Before and afterwards, jax can be imported."""
    program = (
        f"import sys\n{first}\n"
        "from espl_jax.environments.retrievers.load import Bm25\n"
        "from espl_jax.types import Passage\n"
        "assert Bm25([Passage('Oak', 'A tree.')]).search(['tree'], 1)[0][0].title == 'Oak'\n"
        f"assert ('jax' in sys.modules) is bool({first!r})\n"
        "import bm25s.selection, jax.lax\n"
        "assert not bm25s.selection.JAX_IS_AVAILABLE and sys.modules['jax.lax'] is jax.lax\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    "spec", ["passages.csv", "", "ftp://host/retrieve", "http://", "localhost:8000/retrieve"]
)
def test_unknown_specs_are_refused(spec):
    with pytest.raises(ValueError, match="is neither a server nor a file of passages") as caught:
        open_retriever(spec, 10.0)
    assert repr(spec) in str(caught.value)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere/passages\.jsonl"):
        open_retriever("nowhere/passages.jsonl", 10.0)
