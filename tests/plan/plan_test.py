"""Whether a run fits on a slice: reckoned by hand, and for a tiny model by the compiler."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from configs import common
from espl_jax.models.params import abstract
from espl_jax.plan import advice, programs, report
from espl_jax.plan import costs as plan_costs
from espl_jax.plan.chips import CHIPS, find_chip
from espl_jax.plan.programs import Program
from espl_jax.pretrained.hf_config import from_hf_config
from espl_jax.run.workloads import Lengths
from espl_jax.sampling.sizes import EXTENDED_TOKENS
from espl_jax.training.optimizer import make_optimizer
from tests.conftest import run_module
from tests.pretrained.gpt_oss_test import published
from tests.support import tiny
from tests.support.devices import xla_flags

TINY_HF = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


def test_chips_are_found_by_the_names_of_topologies():
    assert find_chip("v5e:4x4") is CHIPS["v5e"]
    for name in ("v9:2x2", "v5e", "4x4"):
        with pytest.raises(ValueError, match=f"topology='{name}': unknown topology; give one of v4, v5e"):
            find_chip(name)


def cost(**fields):
    program = Program("decode chunk", "8 rows x 64 columns", lambda: None, "rollouts", runs=10)
    return plan_costs.Cost(program, **fields)


def test_a_bound_is_the_larger_of_arithmetic_and_memory():
    chip = CHIPS["v5e"]
    assert cost(flops=197e12, moved=0.5 * 819e9).bound(chip) == pytest.approx(1)
    assert cost(flops=0.5 * 197e12, moved=2 * 819e9).bound(chip) == pytest.approx(2)


def test_a_program_fits_with_all_that_is_held_beside_it():
    chip, gib = CHIPS["v5e"], 2.0**30
    small = cost(arguments=10 * gib, temporaries=2 * gib, outputs=1 * gib, beside=2.5 * gib)
    assert small.total == 15.5 * gib and small.fits(chip)
    assert not cost(arguments=10 * gib, temporaries=2 * gib, outputs=1 * gib, beside=3 * gib).fits(chip)
    assert not cost(error="Used 42G of 15.75G hbm").fits(chip)


def test_a_report_says_what_fits_and_what_an_iteration_takes():
    chip, gib = CHIPS["v5e"], 2.0**30
    costs = cost(arguments=3 * gib, moved=0.1 * 819e9), cost(error="Used 42G of 15.75G hbm")
    held = {"weights": 2 * gib, "trained": 0}
    good = plan_costs.Plan("v5e:2x2", chip, {"data": 1, "fsdp": 4}, held, "8 slots", costs[:1])
    assert good.fits and good.iteration == pytest.approx(1)
    text = report.report(good)
    assert "v5e:2x2, fsdp=4: 15.75 GiB of HBM per device." in text and "weights 2.00" in text
    assert "It fits: 3.00 of 15.75 GiB. The longest iteration takes at least 1 s" in text
    bad = plan_costs.Plan("v5e:2x2", chip, {"fsdp": 4}, held, "8 slots", costs)
    assert not bad.fits and "Used 42G of 15.75G hbm" in report.report(bad)
    assert "It does not fit: decode chunk." in report.report(bad)


def test_what_is_held_is_counted_once():
    """Adapters in float32 with Adam's two averages, and their copy for sampling; the base in bfloat16."""
    c = common.get_config()
    c.lora.rank = 4
    config = tiny.CONFIG.replace(param_dtype="bfloat16", dtype="bfloat16")
    sizes = programs.held(c, config, make_optimizer(1e-3), None).sizes()
    weights = sum(w.size for w in jax.tree.leaves(shapes(config)))
    adapters = sizes["trained"] // 4
    assert sizes["weights"] == 2 * weights
    assert (
        sizes["optimizer"] == pytest.approx(8 * adapters, abs=64) and sizes["sampling copy"] == 2 * adapters
    )
    c.lora.rank = 0
    sizes = programs.held(c, config, make_optimizer(1e-3), None).sizes()
    matrices = sum(w.size for w in jax.tree.leaves(shapes(config)) if w.ndim > 2 or 61 in w.shape)
    assert sizes["trained"] == 4 * weights
    assert sizes["sampling copy"] == 2 * matrices + 4 * (weights - matrices)


def test_mxfp4_is_counted_as_dequantized():
    """gpt-oss-20b in bfloat16: two bytes for each of its 20.91 billion parameters."""
    config = from_hf_config(published("gpt-oss-20b"), param_dtype="bfloat16", dtype="bfloat16")
    sizes = programs.held(common.get_config(), config, make_optimizer(1e-3), None).sizes()
    assert sizes["weights"] == pytest.approx(2 * 20.91e9, rel=1e-3)


def test_int8_is_counted_with_its_scales():
    """A byte for each number of a matrix, and four for each output; norms in the compute dtype."""
    c = common.get_config()
    c.lora.rank = 4
    config = tiny.CONFIG.replace(param_dtype="int8", dtype="bfloat16")
    sizes = programs.held(c, config, make_optimizer(1e-3), None).sizes()
    matrices = 2 * (16 * 24 * 2 + 2 * 16 * 12 + 3 * 16 * 20) + 61 * 16
    outputs, norms = 2 * (24 + 12 + 12 + 16 + 20 + 20 + 16) + 61, 2 * 2 * 16 + 16
    assert sizes["weights"] == matrices + 4 * outputs + 2 * norms
    plain = programs.held(c, config.replace(param_dtype="bfloat16"), make_optimizer(1e-3), None).sizes()
    assert {**sizes, "weights": 0} == {**plain, "weights": 0}


def shapes(config):
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.dtype(w.dtype)), abstract(config))


def test_two_chunks_stand_for_all_between_them():
    """Whatever grows with columns as a line does comes out the same."""
    runs = {64: 2.0, 128: 5.0, 256: 7.0, 512: 1.0}
    ends = programs._ends(runs)
    assert list(ends) == [64, 512] and sum(ends.values()) == sum(runs.values())
    for line in (lambda c: 3.0, lambda c: 2 * c + 5):
        total = sum(count * line(columns) for columns, count in runs.items())
        assert sum(count * line(columns) for columns, count in ends.items()) == pytest.approx(total)
    assert programs._ends({64: 3.0}) == {64: 3.0}


@pytest.mark.parametrize(
    ("fields", "scored"),
    [
        ({"kind": "gspo"}, False),
        ({"kind": "gspo", "epochs": 2}, True),
        ({"kind": "ppo", "minibatches": 2}, True),
        ({"minibatches": 2}, False),
        ({"minibatches": 2, "sampler_weight_cap": 2.0}, True),
    ],
    ids=str,
)
def test_old_logprobs_are_a_program_where_an_update_reads_them(fields, scored):
    c, optimizer = common.get_config(), make_optimizer(1e-3)
    c.loss.update(fields)
    held = programs.held(c, tiny.CONFIG, optimizer, None)
    lengths = programs.Lengths(system=8, problem=8, new=16)
    listed = programs.update_programs(c, tiny.CONFIG, held, optimizer, lengths, None)
    assert [p.name for p in listed] == ["logprobs"] * scored + ["policy-gradient step"]


def test_alternatives_change_the_least_first():
    c = common.get_config()
    c.loss.microbatch_rows = 4
    words = [words for words, _, _ in advice.alternatives(c, "v5e:2x4")]
    assert words[0] == "--config.loss.microbatch_rows=1"
    assert "--config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.tensor=8" in words
    assert words.index("--topology=v5e:4x4") < words.index("--topology=v5e:16x16")
    assert not any("2x2" in each for each in words)
    other = next(c for words, c, _ in advice.alternatives(c, "v5e:2x4") if words.endswith("tensor=2"))
    assert other.mesh.tensor == 2 and c.mesh.tensor == 1
    # Nothing is compiled twice: what changes nothing is left out.
    c.loss.microbatch_rows = 1
    configs = [other.to_dict() for _, other, where in advice.alternatives(c, "v5e:2x4") if where == "v5e:2x4"]
    assert c.to_dict() not in configs and all(configs.count(each) == 1 for each in configs)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; pip install libtpu"
)


@needs_libtpu
def test_every_phase_of_a_run_is_lowered_for_the_slice(tmp_path):
    """Conversations of several turns, constrained reflection and evaluation, on four devices. Nothing is
    compiled; tests/plan/programs_test.py holds the list against what runs compile."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_HF))
    c = common.get_config()
    c.model.source, c.data.test, c.environment.name = str(tmp_path), "test.jsonl", "search"
    c.num_prompts = c.batch_size = c.group_size = 2
    c.sampling.max_new_tokens, c.loss.minibatches, c.evaluation.temperature = 64, 2, 0.0
    c.loss.kind = "ppo"  # with several updates a batch, its old logprobs are computed first
    lengths = Lengths(system=64, problem=64, new=64)
    run = plan_costs._run(
        c, "v5e:2x2", lengths, programs.PHASES, every_bucket=False, evaluated=3, tokens_per_step=2.0
    )
    functions = {phase: set() for phase in programs.PHASES}
    for program in run.programs:
        functions[program.phase].add(program.function)
    sampled = {"prefill", "decode_chunk", "admit", "move"}
    assert functions["rollouts"] == sampled | {"extend"} and functions["reflection"] == sampled
    assert functions["update"] == {"policy_gradient_step", "batch_logprobs"}
    assert functions["evaluation"]
    # Behind a row there is room for a piece of an answer.
    assert run.stages[0].capacity == 64 + 64 + EXTENDED_TOKENS
    few = {"extend", "admit", "move"}
    for program in run.programs:
        if program.function in few or "constrained" in program.name:
            assert program.lower().as_text()


@pytest.mark.slow
@needs_libtpu
class TestCommand:
    def command(self, folder, *changes):
        (folder / "config.json").write_text(json.dumps(TINY_HF))
        small = ["num_prompts=2", "batch_size=2", "group_size=4", "sampling.max_new_tokens=64"]
        return run_module(
            "espl_jax.plan",
            "--config=configs/hmmt.py",
            "--topology=v5e:2x2",
            "--system_tokens=64",
            "--problem_tokens=64",
            *(f"--config.{change}" for change in (f"model.source={folder}", *small, *changes)),
            JAX_ENABLE_COMPILATION_CACHE="0",
            XLA_FLAGS=xla_flags(1, libtpu=True),
        )

    def test_a_run_that_fits(self, tmp_path):
        done = self.command(tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "It fits:" in done.stdout and "policy-gradient step" in done.stdout
        assert "edits: constrained step, largest" in done.stdout and "| move " in done.stdout

    def test_no_chunk_copies_the_cache(self, tmp_path):
        """Columns that are no whole tiles would need half of all slots once more, 0.26 GiB here."""
        done = self.command(tmp_path, "group_size=64", "sampling.max_new_tokens=2000")
        assert done.returncode == 0, done.stderr[-2000:]
        rows = [line.split("|") for line in done.stdout.splitlines() if "decode chunk" in line]
        arguments, temporaries = ([float(row[n]) for row in rows] for n in (3, 4))
        assert len(rows) == 9 and min(arguments) > 0.5 and max(temporaries) < 0.1

    def test_a_run_that_does_not_fit_until_its_microbatches_are_small(self, tmp_path):
        """A batch of long rollouts whose layers' inputs alone exceed the chip."""
        done = self.command(
            tmp_path, "group_size=2048", "sampling.max_new_tokens=3000", "loss.microbatch_rows=0"
        )
        assert done.returncode == 1, done.stderr[-2000:]
        assert "It does not fit: policy-gradient step." in done.stdout
        assert "  --config.loss.microbatch_rows=1: " in done.stdout
