"""Fake versions of the hub data sets that the configs use, and a process that loads them.

Columns, types and nesting are those of the real sets; the texts are made up.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from tests.pretrained.hub_server import serve

ROOT = Path(__file__).resolve().parents[2]

DAPO = "BytedTsinghua-SIA/DAPO-Math-17k"
FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def statement(kind, i):
    """Statement number i of a kind; its answer is i + 1."""
    return f"How many of the {i + 1} lamps in the {kind} are lit if all of them are?"


def dapo(count=120, copies=3):
    """Rows of DAPO-Math-17k: each row several times, and statement 0 with two different answers."""

    def row(i, answer):
        content = DAPO_BEFORE + statement("harbor", i) + DAPO_AFTER
        return {
            "data_source": "math_dapo",
            "prompt": [{"content": content, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"9a9b6eb4-a1cb-49d1-8c1e-{i:012d}"},
        }

    return [row(i, str(i + 1)) for i in range(count)] * copies + [row(0, "17")]


def hmmt(kind, count=30):
    """Rows of MathArena's sets."""
    return [
        {
            "problem_idx": i + 1,
            "problem": statement(kind, i),
            "answer": f"\\frac{{{2 * (i + 1)}}}{{2}}",
            "problem_type": ["Combinatorics"],
        }
        for i in range(count)
    ]


def aime(kind, count, **others):
    """Rows of AIMO's and AIME's sets."""
    return [
        {
            "id": i,
            "problem": statement(kind, i),
            "solution": "All.",
            "answer": str(i + 1),
            "url": "",
            **others,
        }
        for i in range(count)
    ]


def gsm8k(kind, count):
    """Rows of GSM8K."""
    return [
        {
            "question": statement(kind, i),
            "answer": f"All <<{i}+1={i + 1}>>{i + 1} are.\n#### {i + 1}",
        }
        for i in range(count)
    ]


def flashrag(kind, count, split):
    """Rows of FlashRAG's sets, whose ids start again in each; the last answer is also correct."""
    return [
        {
            "id": f"{split}_{i}",
            "question": statement(kind, i),
            "golden_answers": [str(i + 1), f"all {i + 1} of them"],
        }
        for i in range(count)
    ]


def hub_rows():
    """All data sets that the configs name: data set -> split, or configuration and split -> rows."""
    return {
        DAPO: {"train": dapo()},
        "yentinglin/aime_2025": {"train": aime("mill", 30, year=2025)},
        "MathArena/hmmt_feb_2023": {"train": hmmt("tower")},
        "MathArena/hmmt_feb_2024": {"train": hmmt("bridge")},
        "MathArena/hmmt_feb_2025": {"train": hmmt("tunnel")},
        "MathArena/hmmt_nov_2025": {"train": hmmt("garden")},
        "AI-MO/aimo-validation-aime": {"train": aime("library", 90)},
        "ByteDance-Seed/BeyondAIME": {
            "test": [{"problem": statement("station", i), "answer": i + 1} for i in range(100)]
        },
        "openai/gsm8k": {
            ("main", "train"): gsm8k("kitchen", 200),
            ("main", "test"): gsm8k("cellar", 600),
            ("socratic", "train"): gsm8k("attic", 5),
            ("socratic", "test"): gsm8k("barn", 5),
        },
        FLASHRAG: {
            ("nq", "train"): flashrag("market", 120, "train"),
            ("nq", "test"): flashrag("palace", 32, "test"),
            ("hotpotqa", "train"): flashrag("museum", 120, "train"),
            ("hotpotqa", "dev"): flashrag("theatre", 32, "dev"),
        },
    }


def as_parquet(rows):
    """The bytes of a parquet file; `rows` are dicts, or a table."""
    file = io.BytesIO()
    parquet.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), file)
    return file.getvalue()


def published(rows):
    """Rows by data set and split, as in `hub_rows` -> data set -> {file name: bytes}."""
    return {name: _files(name, splits) for name, splits in rows.items()}


def _files(name, splits):
    if name.startswith(DAPO):  # whose file is not called after its split
        return {"data/dapo-math-17k.parquet": as_parquet(splits["train"])}
    files, card = {}, {}
    for key, rows in splits.items():
        config, split = key if isinstance(key, tuple) else ("data", key)
        files[f"{config}/{split}-00000-of-00001.parquet"] = as_parquet(rows)
        card.setdefault(config, []).append(f"  - split: {split}\n    path: {config}/{split}-*\n")
    if set(card) != {"data"}:
        lines = [f"- config_name: {config}\n  data_files:\n{''.join(card[config])}" for config in card]
        files["README.md"] = f"---\nconfigs:\n{''.join(lines)}---\n".encode()
    return files


@contextlib.contextmanager
def loader(rows, folder, gated=()):
    """Yields a function that does each of its jobs with the package `datasets` and a hub that has these rows.

    A job is the arguments of `data.load`, or `{"config": name, "changes": {field: value}}` for the splits of
    a configuration. Its answer has [name, [[id, text, answer], ...]] for each split (`all` of a set), or is
    `Kind: message` of the error. A process of its own does them, because the address of the hub is read when
    `datasets` is imported.
    """
    with serve({}, gated, datasets=published(rows)) as (address, _):

        def load(*jobs, **environment):
            variables = {
                "HF_ENDPOINT": address,
                "HF_HOME": str(folder / "huggingface"),
                "HF_UPDATE_DOWNLOAD_COUNTS": "0",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "127.0.0.1",
            }
            done = subprocess.run(
                [sys.executable, "-m", "tests.support.dataset_hub"],
                input=json.dumps(jobs),
                cwd=ROOT,
                env=os.environ | variables | environment,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        yield load


def _do(job):
    from espl_jax.data import load as data_load

    if "config" in job:
        import importlib

        from espl_jax.run.tasks import load_splits

        config = importlib.import_module(f"configs.{job['config']}").get_config()
        config.update_from_flattened_dict(job.get("changes", {}))
        sets = load_splits(config)
    else:
        sets = {"all": data_load.load(**job)}
    return {
        split: [found.name, [[problem.id, problem.text, problem.answer] for problem in found.problems]]
        for split, found in sets.items()
    }


def _main():
    answers = []
    for job in json.load(sys.stdin):
        try:
            answers.append(_do(job))
        except (ValueError, OSError) as error:
            kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
            answers.append(f"{kind.__name__}: {error}")
    print(json.dumps(answers))


if __name__ == "__main__":
    _main()
