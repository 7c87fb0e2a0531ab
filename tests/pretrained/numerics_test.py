"""What "auto" stands for, by machine; and that a run keeps what it began with."""

import json

import pytest

from espl_jax.pretrained import numerics
from espl_jax.pretrained.numerics import AUTO, CHOSEN, resolve
from espl_jax.run import weights
from tests.support import fakes, tiny

ALL = dict.fromkeys(CHOSEN, AUTO)


def unread():
    raise AssertionError("the model's size does not matter here")


@pytest.mark.parametrize(
    ("instructions", "gib", "dtypes"),
    [
        (True, 1, ("float32", "bfloat16", "bfloat16")),
        (False, 1, ("float32", "float32", "default")),
        (False, 0, ("float32", "bfloat16", "default")),
    ],
    ids=["bfloat16 instructions", "none", "none, and no room for float32"],
)
def test_on_a_cpu(monkeypatch, instructions, gib, dtypes):
    monkeypatch.setattr(numerics, "multiplies_bfloat16", lambda: instructions)
    monkeypatch.setattr(numerics, "device_memory", lambda: gib << 30)
    seen = resolve(ALL, lambda: tiny.CONFIG, platform="cpu", devices=1)
    assert tuple(seen.values()) == (*dtypes, "unstacked")
    assert resolve(ALL, lambda: tiny.CONFIG, platform="cpu", devices=8)["sampling_layout"] == "stacked"


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_on_an_accelerator(monkeypatch, platform):
    monkeypatch.setattr(numerics, "multiplies_bfloat16", lambda: False)
    seen = resolve(ALL, unread, platform=platform, devices=1)
    assert tuple(seen.values()) == ("bfloat16", "bfloat16", "default", "stacked")


def test_what_is_given_stays():
    given = {"dtype": "float32", "param_dtype": "bfloat16", "remat": "none", "lora_scale": 2.0}
    assert resolve(given, unread) == given


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx2 avx512f", False),
    ],
    ids=["x86", "arm", "old"],
)
def test_instructions_are_read_from_cpuinfo(monkeypatch, tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr(numerics, "CPUINFO", tmp_path / "cpuinfo")
    assert numerics.multiplies_bfloat16() is expected
    monkeypatch.setattr(numerics, "CPUINFO", tmp_path / "none")
    assert not numerics.multiplies_bfloat16()


def test_a_resumed_run_keeps_what_was_recorded(monkeypatch, tmp_path):
    """On a machine of another kind, too; the work directory judges what is given on the command line."""
    monkeypatch.setattr(numerics, "multiplies_bfloat16", lambda: True)
    config = fakes.config(model__dtype=AUTO, model__param_dtype=AUTO, model__matmul_precision="highest")
    first = weights.settle_numerics(config, tmp_path)
    assert (first.model.param_dtype, first.model.matmul_precision) == ("bfloat16", "highest")
    assert config.model.param_dtype == AUTO
    (tmp_path / "config.json").write_text(json.dumps({"model": {**first.model, "param_dtype": "float32"}}))
    again = weights.settle_numerics(config, tmp_path)
    assert (again.model.dtype, again.model.param_dtype) == ("float32", "float32")
    assert again.model.matmul_precision == "highest"
