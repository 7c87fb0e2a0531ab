"""The configs build their problem sets from the hub's formats, and refuse what they cannot use."""

import importlib
import json

import datasets
import numpy as np
import pyarrow as pa
import pytest

from espl_jax.run.check_config import check_config
from espl_jax.run.tasks import load_splits
from tests.support import dataset_hub
from tests.support.dataset_hub import statement

MATH = ("dapo", "hmmt", "aime", "gsm8k")
CONFIGS = (*MATH, "search")
SIZES = {
    "dapo": {"train": 90, "validation": 10, "test": 30},
    "hmmt": {"train": 80, "validation": 10, "test": 30},
    "aime": {"train": 80, "validation": 10, "test": 100},
    "gsm8k": {"train": 100, "validation": 100, "test": 500},
    "search": {"train": 186, "validation": 10, "test": 64},
}
PLACES = {
    "dapo": ({"harbor"}, {"mill"}),
    "hmmt": ({"tower", "bridge", "tunnel"}, {"garden"}),
    "aime": ({"library"}, {"station"}),
    "gsm8k": ({"kitchen"}, {"cellar"}),
    "search": ({"market", "museum"}, {"palace", "theatre"}),
}


USED = {
    "dapo": (dataset_hub.DAPO, "train", "yentinglin/aime_2025", "train"),
    "hmmt": ("MathArena/hmmt_feb_2024", "train", "MathArena/hmmt_nov_2025", "train"),
    "aime": ("AI-MO/aimo-validation-aime", "train", "ByteDance-Seed/BeyondAIME", "test"),
    "gsm8k": ("openai/gsm8k", ("main", "train"), "openai/gsm8k", ("main", "test")),
    "search": (dataset_hub.FLASHRAG, ("nq", "train"), dataset_hub.FLASHRAG, ("nq", "test")),
}
"""Config -> a data set and split of its training problems, and of its test."""


def renamed_column(name, rows):
    """Training problems whose answers are in a column of another name, and what the message has to say."""
    train, split, _, _ = USED[name]
    old = {"dapo": "reward_model", "search": "golden_answers"}.get(name, "answer")
    changed = [{"gold" if key == old else key: row[key] for key in row} for row in rows[train][split]]
    field = f"{old}.ground_truth" if name == "dapo" else old
    return (
        "train",
        changed,
        (f"no field '{field}'; the fields are [", "'gold'", "holds the answer with the option answer=FIELD"),
    )


def empty_split(name, rows):
    """A test without problems."""
    _, _, test, split = USED[name]
    last = split[1] if isinstance(split, tuple) else split
    changed = pa.Table.from_pylist(rows[test][split]).slice(0, 0)
    return (
        "test",
        changed,
        (f": the split '{last}' is empty; choose another split with the option split=NAME",),
    )


def overlapping_splits(name, rows):
    """A test with one of the training problems, set in type differently."""
    _, _, test, split = USED[name]
    seed = {"dapo": 42, "search": 0}.get(name)  # of those that shuffle 120 and take the first
    number = 5 if seed is None else int(np.random.default_rng(seed).permutation(120)[0])
    places = {"dapo": "harbor", "hmmt": "bridge", "aime": "library", "gsm8k": "kitchen", "search": "market"}
    text = statement(places[name], number).upper().replace(" LAMPS", "\\,  $LAMPS$")
    changed = list(rows[test][split])
    changed[3] = {**changed[3], "question" if "question" in changed[3] else "problem": text}
    return "test", changed, ("problem '", " has the same text as '", "remove it from one of them")


SPOILERS = (renamed_column, empty_split, overlapping_splits)


def spoiled(name, spoil):
    """A data set of this config with something wrong, the job of loading the config with it, the message."""
    rows = dataset_hub.hub_rows()
    part, changed, message = spoil(name, rows)
    original, split = USED[name][:2] if part == "train" else USED[name][2:]
    worse = f"{original}-{spoil.__name__}"
    spec = importlib.import_module(f"configs.{name}").get_config().data[part].replace(original, worse)
    job = {"config": name, "changes": {f"data.{part}": spec}}
    others = {} if spoil is renamed_column else rows[original]  # all splits of a set have the same columns
    return {worse: {**others, split: changed}}, job, (f"hub:{worse}", *message)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Name of a config, also with something after it -> its splits, all loaded by one process."""
    rows = dataset_hub.hub_rows()
    jobs = {name: {"config": name} for name in CONFIGS}
    jobs["aime, another seed"] = {"config": "aime", "changes": {"seed": 1}}
    for name in CONFIGS:
        for spoil in SPOILERS:
            more, jobs[f"{name}, {spoil.__name__}"], _ = spoiled(name, spoil)
            rows |= more
    with dataset_hub.loader(rows, tmp_path_factory.mktemp("hub")) as load:
        return dict(zip(jobs, load(*jobs.values()), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_problem_sets_are_built_from_the_hub(built, name):
    splits = built[name]
    assert not isinstance(splits, str), splits
    assert {split: len(problems) for split, (_, problems) in splits.items()} == SIZES[name]
    places = [
        {text.split(" lamps in the ")[1].split(" are ")[0] for _, text, _ in splits[split][1]}
        for split in ("train", "validation", "test")
    ]
    train, test = PLACES[name]
    assert places == [train, places[1], test] and places[1] <= train
    for _, problems in splits.values():
        for _, text, answer in problems:
            count = int(text.removeprefix("How many of the ").split()[0])
            expected = f"\\frac{{{2 * count}}}{{2}}" if name == "hmmt" else str(count)
            # The first of two answers is kept; the set of DAPO has such statements.
            assert text.startswith("How many") and text.endswith("all of them are?") and answer == expected
    ids = [identity for _, problems in splits.values() for identity, _, _ in problems]
    assert len(set(ids)) == len(ids)


def test_dapo_keeps_first_answers_then_shuffles_as_datasets_does(built):
    numbers = datasets.Dataset.from_dict({"i": range(120)}).shuffle(seed=42)["i"][:100]
    taken = {text for split in ("train", "validation") for _, text, _ in built["dapo"][split][1]}
    assert taken == {statement("harbor", i) for i in numbers}


def test_held_out_problems_are_those_of_the_seed(built):
    one, other = built["aime"], built["aime, another seed"]
    assert one["validation"] != other["validation"] and one["test"] == other["test"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_used_is_refused(built, name, spoil):
    message = built[f"{name}, {spoil.__name__}"]
    assert isinstance(message, str) and message.startswith("ValueError: ")
    for part in spoiled(name, spoil)[2]:
        assert part in message, message


@pytest.mark.parametrize("name", MATH)
def test_problem_sets_are_built_from_local_files(name, tmp_path):
    for file, place in (("train", "attic"), ("test", "barn")):
        rows = [{"problem": statement(place, i), "answer": i + 1} for i in range(40)]
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = importlib.import_module(f"configs.{name}").get_config()
    config.data.train = f"{tmp_path}/train.jsonl:count=35"
    config.data.test = f"{tmp_path}/test.jsonl"
    config.data.validation_count = 5
    check_config(config)
    assert {split: len(found) for split, found in load_splits(config).items()} == {
        "train": 30,
        "validation": 5,
        "test": 40,
    }


@pytest.mark.parametrize("name", MATH)
def test_configs_pass_the_checks_that_come_before_loading(name):
    check_config(importlib.import_module(f"configs.{name}").get_config())


def test_search_needs_a_retriever_or_an_encyclopedia():
    config = importlib.import_module("configs.search").get_config()
    with pytest.raises(ValueError, match=r"environment\.search\.retriever='': no retriever; give http"):
        check_config(config)
    config.environment.search.retriever = "http://localhost:8000/retrieve"
    check_config(config)
    config.environment.search.retriever = "no_such.jsonl"
    with pytest.raises(ValueError, match=r"retriever='no_such\.jsonl': file not found"):
        check_config(config)
    config.environment.search.retriever = ""
    config.data.train = config.data.validation = config.data.test = "encyclopedia"
    check_config(config)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/there.jsonl + {}/none.parquet:count=3", ".*/none.parquet does not exist; correct"),
        ("{}/there.jsonl:count=3,split=test", "invalid or repeated option 'split=test'"),
        ("{}/there.json", "not a data spec; give the path of a .jsonl or .parquet file"),
        ("hub:org/name/part", "not a data spec; give the path"),
    ],
)
def test_specs_are_checked_before_anything_is_loaded(tmp_path, spec, message):
    (tmp_path / "there.jsonl").touch()
    config = importlib.import_module("configs.hmmt").get_config()
    config.data.test = spec.replace("{}", str(tmp_path))
    with pytest.raises(ValueError, match=rf"^data.test='.*{message}"):
        check_config(config)
    config.data.test = f"{tmp_path}/there.jsonl:count=3 + hub:org/name"
    check_config(config)


def test_gsm8k_from_its_own_files(shared):
    config = importlib.import_module("configs.gsm8k").get_config()
    config.data.train = str(shared / "data" / "gsm8k_train_2000.jsonl")
    config.data.test = f"{shared / 'data' / 'gsm8k_test.jsonl'}:count=500"
    splits = load_splits(config)
    assert {split: len(found) for split, found in splits.items()} == {
        "train": 1900,
        "validation": 100,
        "test": 500,
    }
    assert not any("<<" in p.answer or "#" in p.answer for found in splits.values() for p in found.problems)
