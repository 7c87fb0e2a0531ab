"""A run on a tiny mixture of experts: every stage, killed and resumed bit for bit, and exported."""

import io

import numpy as np
import pytest
from rich.console import Console

from espl_jax.export.export import export
from espl_jax.models.config import Experts, Latent, Rope
from espl_jax.pretrained.load import load_pretrained
from espl_jax.run import reflection
from espl_jax.run.saved import read_run
from espl_jax.train import train
from tests.support import fakes, tiny
from tests.train_test import arrays, lines, outcome

MIXTURES = {
    "qwen3_moe": fakes.CONFIG.replace(family="qwen3_moe", qk_norm=True, experts=Experts(4, 2, 24)),
    "gpt_oss": fakes.CONFIG.replace(
        family="gpt_oss",
        mlp_dim=24,
        experts=Experts(4, 2, 24, bias=True),
        activation="clamped_swiglu",
        attention_sinks=True,
        qkv_bias=True,
        out_bias=True,
        windows=(8, 0),
    ),
    "deepseek_v3": fakes.CONFIG.replace(
        family="deepseek_v3",
        tied_head=False,
        num_layers=3,
        first_dense=1,
        num_kv_heads=4,
        latent=Latent(kv_rank=6, rope_dim=4, value_dim=5, query_rank=7),
        rope=Rope(interleaved=True),
        experts=Experts(
            *(4, 2, 24),
            scores="sigmoid",
            scale=2.5,
            corrected=True,
            groups=2,
            active_groups=1,
            shared_dim=24,
        ),
    ),
}


def run(folder, **changes):
    config = fakes.config(mode="espl", evaluation__every=0, evaluation__test_samples=1, **changes)
    train(config, folder, Console(file=io.StringIO()))


SLOW = pytest.mark.slow


@pytest.fixture(params=["qwen3_moe", *(pytest.param(x, marks=SLOW) for x in ("gpt_oss", "deepseek_v3"))])
def mixture(request, monkeypatch):
    fakes.model.cache_clear()
    config = MIXTURES[request.param]
    monkeypatch.setattr(fakes, "CONFIG", config)
    fakes.take_over(monkeypatch)
    monkeypatch.setattr(reflection, "local_reflector", lambda model, **settings: fakes.scripted_replies)
    yield config
    fakes.model.cache_clear()


@pytest.mark.parametrize("rank", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit(rank, mixture, tmp_path):
    """Training adapters of attention and experts, or all weights, the router too."""
    run(tmp_path / "whole", num_iterations=2, lora__rank=rank)
    with fakes.killed_before_saving(iteration=2):
        run(tmp_path / "parts", num_iterations=2, lora__rank=rank)
    run(tmp_path / "parts", num_iterations=2, lora__rank=rank)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")

    assert lines(tmp_path / "whole", "reflections")
    for row in lines(tmp_path / "whole", "metrics"):
        assert row["expert_load_min"] <= 1 <= row["expert_load_max"] and row["routing_disagreements"] == 0
    trained = arrays(tmp_path / "whole")
    routers = [name for name in trained if "router" in name and ".trainable" in name]
    assert bool(routers) == (rank == 0)
    sinks = [name for name in trained if "sinks" in name and ".trainable" in name]
    assert bool(sinks) == (rank == 0 and mixture.attention_sinks)
    assert all(np.all(np.abs(trained[name]) > 1e-6) for name in sinks), "they start at 0"
    for name in [x for x in routers if "correction" in x]:
        np.testing.assert_array_equal(trained[name], 0)  # it has no gradient
    name = ".trainable['layers']['mlp']['up']" + ("['lora_b']" if rank else "['weight']")
    assert trained[name].shape[:2] == (2, 4)
    before = 0 if rank else np.asarray(fakes.model().params["layers"]["mlp"]["up"]["weight"])
    # An expert that no token chose would not move.
    assert np.all(np.abs(trained[name] - before).max((2, 3)) > 1e-6)

    export(tmp_path / "whole", tmp_path / "out", dtype="float32", say=lambda line: None)
    policy, back = read_run(tmp_path / "whole").model, load_pretrained(tmp_path / "out")
    assert (back.config.experts, back.config.family) == (mixture.experts, mixture.family)
    tokens = np.arange(32).reshape(2, 16)
    wanted = tiny.logits(policy.params, policy.config, tokens)
    np.testing.assert_allclose(tiny.logits(back.params, back.config, tokens), wanted, atol=1e-4)
