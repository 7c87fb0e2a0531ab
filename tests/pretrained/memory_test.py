"""Loading a checkpoint never holds it twice: anonymous memory of a process that does nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from espl_jax.pretrained import stream
from tests.pretrained import synthetic_checkpoint

MB = 10**6


def load(folder, config, stored, param_dtype):
    synthetic_checkpoint.write(folder, config, stored, num_shards=5)
    result = subprocess.run(
        [sys.executable, synthetic_checkpoint.__file__, str(folder), param_dtype],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(result.stdout.splitlines()[-1])
    print({name: value // MB if value > MB else value for name, value in figures.items()})
    assert figures["devices"] == 8
    return figures


@pytest.mark.parametrize("param_dtype", ["bfloat16", "int8"])
def test_a_small_one(tmp_path, param_dtype):
    config = synthetic_checkpoint.hf_config(num_layers=4, width=1024, mlp=4096, vocabulary=32768)
    figures = load(tmp_path, config, "BF16", param_dtype)
    assert figures["sharded_total"] > (250 if param_dtype == "bfloat16" else 125) * MB
    # A tenth of the model beside a tensor and a half, over what the process needs for itself. Int8 is rounded
    # in blocks: of each, there are some float32 arrays.
    blocks = 5 * 4 * stream.BLOCK if param_dtype == "int8" else 0
    bound = figures["before"] + figures["sharded_total"] + 1.5 * figures["largest_tensor"] + 30 * MB + blocks
    assert figures["most"] < bound


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "param_dtype"),
    [("BF16", "bfloat16"), ("BF16", "float32"), ("F32", "bfloat16"), ("F32", "float32"), ("BF16", "int8")],
)
def test_three_gigabytes(tmp_path, stored, param_dtype):
    layers, vocabulary = (16, 128256) if stored == "BF16" else (8, 64128)
    config = synthetic_checkpoint.hf_config(layers, width=2048, mlp=8192, vocabulary=vocabulary)
    figures = load(tmp_path, config, stored, param_dtype)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    for path in tmp_path.iterdir():
        path.unlink()
    assert size > 2900 * MB
    assert figures["most"] < figures["sharded_total"] + 1.5 * figures["largest_tensor"] + 500 * MB
