"""Adapters in PEFT's format, tensor by tensor; `round_trip_test` has PEFT itself."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from espl_jax.choices import LORA_TARGETS
from espl_jax.pretrained.load import load_pretrained
from espl_jax.pretrained.peft import base_of, load_adapter, read_settings, save_adapter
from espl_jax.text.chat import render
from tests.support import fakes, tiny

CONFIG = fakes.CONFIG.replace(lora_scale=0.5)


def assert_same(ours, others):
    assert jax.tree.structure(ours) == jax.tree.structure(others)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(others), strict=True):
        assert x.dtype == y.dtype == np.float32
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("targets", [("query",), ("gate", "out"), LORA_TARGETS[:7]])
def test_some_targets(targets, tmp_path):
    adapters = tiny.adapters(CONFIG, targets=targets)
    save_adapter(tmp_path / "out", adapters, CONFIG, fakes.tokenizer(), base="a/b")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    theirs = {"query": "q_proj", "out": "o_proj", "gate": "gate_proj"}
    assert set(settings["target_modules"]) >= {theirs[t] for t in targets if t in theirs}
    assert len(settings["target_modules"]) == len(targets)
    assert (settings["r"], settings["lora_alpha"]) == (3, 1.5)
    assert settings["base_model_name_or_path"] == "a/b"
    assert_same(load_adapter(tmp_path / "out", CONFIG)[0], adapters)


def test_one_tensor_by_hand(tmp_path):
    adapters = tiny.adapters(CONFIG)
    save_adapter(tmp_path / "out", adapters, CONFIG, fakes.tokenizer(), base="a/b")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    node = adapters["layers"]["attention"]["out"]
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_"
    # A takes the heads' outputs, head by head; B gives the residual stream.
    np.testing.assert_array_equal(tensors[f"{name}A.weight"], node["lora_a"][1].reshape(4 * 8, 3).T)
    np.testing.assert_array_equal(tensors[f"{name}B.weight"], node["lora_b"][1].T)
    assert len(tensors) == 2 * 7 * 2


def test_the_prompt_comes_with_it(tmp_path):
    folder = tmp_path / "out"
    save_adapter(folder, tiny.adapters(CONFIG), CONFIG, fakes.tokenizer(), "Add.", base="b", model_card="# A")
    user = {"role": "user", "content": "1"}
    rendered = render(AutoTokenizer.from_pretrained(folder), [user])
    assert rendered == render(fakes.tokenizer(), [{"role": "system", "content": "Add."}, user])
    assert (folder / "system_prompt.txt").read_text() == "Add."
    assert (folder / "README.md").read_text() == "# A"


class TestReading:
    @pytest.fixture
    def folder(self, tmp_path):
        save_adapter(tmp_path / "a", tiny.adapters(CONFIG), CONFIG, fakes.tokenizer(), base="a/b")
        return tmp_path / "a"

    def settings(self, folder, **changes):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def tensors(self, folder, change):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    def test_rank_stabilized_scale(self, folder):
        self.settings(folder, use_rslora=True, lora_alpha=6)
        assert load_adapter(folder, CONFIG)[1] == pytest.approx(6 / 3**0.5)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("use_dora", True),
            ("bias", "all"),
            ("peft_type", "IA3"),
            ("rank_pattern", {"q_proj": 4}),
            *(("init_lora_weights", name) for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq")),
            ("init_lora_weights", "lora_ga"),
            ("init_lora_weights", "of tomorrow"),
            ("kasa_config", {"r": 4}),
            ("use_bdlora", {"nblocks": 2}),
            ("r", None),
            ("r", 0),
            ("lora_alpha", "16"),
            ("target_parameters", 5),
            ("target_parameters", [1]),
        ],
    )
    def test_settings_that_are_not_computed(self, folder, field, value):
        self.settings(folder, **{field: value})
        with pytest.raises(ValueError, match=f"adapter_config.json: {field}="):
            load_adapter(folder, CONFIG)

    @pytest.mark.parametrize("pattern", [5, ["gate_up_proj"], {"gate_up_proj": "4"}, {"gate_up_proj": -1}])
    @pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
    def test_patterns_of_the_wrong_kind(self, folder, field, pattern):
        """They are supported for gpt-oss, and checked before the base is known."""
        self.settings(folder, **{field: pattern})
        for config in (None, CONFIG.replace(family="gpt_oss")):
            with pytest.raises(ValueError, match=f"{field}=.*: must give a number of at least"):
                read_settings(folder, config)

    @pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
    def test_initializations_that_leave_the_base_alone(self, folder, start):
        self.settings(folder, init_lora_weights=start)
        assert_same(load_adapter(folder, CONFIG)[0], tiny.adapters(CONFIG))

    @pytest.mark.filterwarnings("error")
    def test_settings_as_peft_writes_them(self, folder):
        """Nothing of them is unknown; what is, is said and ignored, as PEFT does."""
        peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
        theirs = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
        theirs.save_pretrained(folder)
        assert load_adapter(folder, CONFIG)[1] == 2.0
        self.settings(folder, use_tomorrow=True, use_yesterday=False)
        with pytest.warns(UserWarning, match=r"adapter_config.json: unknown settings {'use_tomorrow': True}"):
            load_adapter(folder, CONFIG)

    NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop(TestReading.NAME), f"1 tensors are missing, the first is {NAME}"),
            (
                lambda t: t.update(extra=np.ones(1)),
                "1 tensors are not part of this decoder, the first is extra",
            ),
            (
                lambda t: t.update({TestReading.NAME: np.ones((3, 5), np.float32)}),
                r"is \[3, 5\], .*\[3, 32\]",
            ),
            (
                lambda t: t.update({TestReading.NAME: np.ones((3, 32), np.int8)}),
                f"1 tensors are of another dtype .* {NAME}",
            ),
            (lambda t: [t.pop(name) for name in list(t)[1:]], "tensors are missing"),
        ],
    )
    def test_tensors_that_do_not_fit(self, folder, change, message):
        self.tensors(folder, change)
        with pytest.raises(ValueError, match=message):
            load_adapter(folder, CONFIG)

    def test_of_another_model(self, folder):
        with pytest.raises(ValueError, match="14 tensors are missing"):
            load_adapter(folder, CONFIG.replace(num_layers=3))
        self.tensors(folder, lambda t: (t.clear(), t.update(x=np.ones(1))))
        with pytest.raises(ValueError, match="no adapter for this decoder, but x"):
            load_adapter(folder, CONFIG)

    def test_files_that_are_not_there(self, folder):
        (folder / "adapter_model.safetensors").write_bytes(b"\x10")
        with pytest.raises(ValueError, match="truncated"):
            load_adapter(folder, CONFIG)
        (folder / "adapter_config.json").write_text("{")
        with pytest.raises(ValueError, match=r"adapter_config.json is not JSON"):
            load_pretrained(folder)
        (folder / "adapter_config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"adapter_config.json does not exist"):
            load_adapter(folder, CONFIG)


@pytest.mark.parametrize("base", ["org/name", "org/name@v2", "/models/some@thing"])
def test_the_base_comes_back(base, tmp_path):
    save_adapter(tmp_path / "out", tiny.adapters(CONFIG), CONFIG, fakes.tokenizer(), base=base)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base.removesuffix("@v2")
    assert settings["revision"] == ("v2" if base.endswith("@v2") else None)
    assert base_of(tmp_path / "out") == base


def test_settings_are_read_before_the_base(tmp_path):
    save_adapter(tmp_path / "out", tiny.adapters(CONFIG), CONFIG, fakes.tokenizer(), base="/none/such")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="init_lora_weights='pissa' is not supported; merge the adapter"):
        load_pretrained(tmp_path / "out")


def test_a_base_that_is_not_to_be_had(tmp_path):
    gone = str(tmp_path / "gone")
    save_adapter(tmp_path / "out", tiny.adapters(CONFIG), CONFIG, fakes.tokenizer(), base=gone)
    with pytest.raises(
        FileNotFoundError, match=f"out is an adapter, and its base model {gone} cannot be loaded"
    ):
        load_pretrained(tmp_path / "out")
