"""What is in a folder of merged weights, and what is refused; `round_trip_test` has every family."""

import copy
import errno
import json
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from espl_jax.choices import LORA_TARGETS
from espl_jax.models import lora
from espl_jax.pretrained import save
from espl_jax.pretrained.hf_config import from_hf_config
from espl_jax.pretrained.load import load_pretrained
from espl_jax.pretrained.save import save_pretrained
from espl_jax.text.chat import render
from espl_jax.text.chat_template import template_file, template_for
from espl_jax.types import SystemPrompt
from tests.support import fakes, families, tiny
from tests.text.tools_test import TOOLS

CONFIG = fakes.CONFIG.replace(lora_scale=0.5)
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 24)).astype(np.int32)


def adapted(config, targets=LORA_TARGETS[:7]):
    return lora.attach(tiny.params(config), tiny.adapters(config, targets=targets))


def torch_logits(model):
    with torch.no_grad():
        return families.torch_logits(model, TOKENS).numpy()


def worst(ours, reference):
    """The largest difference, in parts of the largest logit."""
    return np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()


def test_what_is_in_the_folder(tmp_path):
    prompt = SystemPrompt(text="Reply with\r\nthe sum.", principles=("Say {{ it }}.",))
    generation = {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0}
    folder = tmp_path / "runs" / "out"
    save_pretrained(
        folder,
        tiny.params(CONFIG),
        CONFIG,
        fakes.tokenizer(),
        prompt,
        generation=generation,
        model_card="# M",
    )
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "system_prompt.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert (folder / "README.md").read_text() == "# M"
    assert (folder / "system_prompt.txt").read_bytes().decode() == prompt.render()
    user = {"role": "user", "content": "1 + 1?"}
    asked = [{"role": "system", "content": prompt.render()}, user]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert render(tokenizer, [user]) == render(fakes.tokenizer(), asked)
    assert tokenizer.encode("a <|im_end|>") == fakes.tokenizer().encode("a <|im_end|>")
    # The tokenizer that was given is as it was.
    assert fakes.tokenizer().chat_template == fakes.TEMPLATE

    ids = fakes.tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    loaded = GenerationConfig.from_pretrained(folder)
    assert [loaded.eos_token_id, loaded.pad_token_id] == ids
    assert (loaded.do_sample, loaded.temperature, loaded.top_p, loaded.top_k) == (True, 0.7, 1.0, 0)
    described = json.loads((folder / "config.json").read_text())
    assert described["eos_token_id"] == ids[0]
    assert described["dtype"] == described["torch_dtype"] == "float32"
    numerics = {"lora_scale": 0.5, "sampling_layout": "stacked"}
    assert from_hf_config(described, **numerics).replace(windows=()) == CONFIG.replace(windows=())


def test_without_a_system_prompt_the_template_is_the_models_own(tmp_path):
    save_pretrained(tmp_path / "none", tiny.params(CONFIG), CONFIG, fakes.tokenizer())
    save_pretrained(tmp_path / "empty", tiny.params(CONFIG), CONFIG, fakes.tokenizer(), SystemPrompt())
    for name in ("none", "empty"):
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == fakes.TEMPLATE
    assert not (tmp_path / "none" / "system_prompt.txt").exists()
    assert (tmp_path / "empty" / "system_prompt.txt").read_text() == ""


def test_shards_hold_what_one_file_does(tmp_path):
    params = adapted(CONFIG)
    save_pretrained(tmp_path / "one", params, CONFIG, fakes.tokenizer())
    save_pretrained(tmp_path / "many", params, CONFIG, fakes.tokenizer(), max_shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sum(x.nbytes for x in whole.values()) == index["metadata"]["total_size"]
    sharded = {}
    for file in files:
        part = load_file(tmp_path / "many" / file)
        # Only a tensor too large for any file may make one too large.
        assert sum(x.nbytes for x in part.values()) <= 20_000 or len(part) == 1
        assert {index["weight_map"][name] for name in part} == {file}
        sharded |= part
    assert sharded.keys() == whole.keys()
    assert all(np.array_equal(sharded[name], whole[name]) for name in whole)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert worst(tiny.logits(params, CONFIG, TOKENS), torch_logits(model)) < 1e-4


def test_merging_rounds_once(tmp_path):
    """bfloat16 weights and float32 adapters: their sum is rounded, not the adapters' product before it."""
    config = CONFIG.replace(param_dtype="bfloat16")
    params = adapted(config)
    save_pretrained(tmp_path / "out", params, config, fakes.tokenizer())
    save_pretrained(tmp_path / "exact", params, config, fakes.tokenizer(), dtype=jnp.float32)
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    node = params["layers"]["attention"]["query"]
    by_hand = np.asarray(node["weight"][1], np.float64) + 0.5 * np.einsum(
        "dr,rnh->dnh", np.asarray(node["lora_a"][1], np.float64), np.asarray(node["lora_b"][1], np.float64)
    )
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_allclose(exact[name], by_hand.reshape(32, 32).T, rtol=1e-5, atol=1e-6)
    with safe_open(str(tmp_path / "out" / "model.safetensors"), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            rounded = file.get_tensor(name)
            assert rounded.dtype == torch.bfloat16
            assert torch.equal(rounded, torch.tensor(exact[name]).bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_int8_is_dequantized(family, tmp_path):
    """Merged in float32, as the weights that int8 stands for are; without adapters, back to the same int8."""
    config = families.our_config(families.draw_hf_config(family, 0), param_dtype="int8", lora_scale=0.5)
    config = config.replace(vocab_size=fakes.CONFIG.vocab_size)
    params, plain = adapted(config), config.replace(param_dtype="float32")
    floats = tiny.in_float(params, config)
    save_pretrained(tmp_path / "ours", params, config, fakes.tokenizer(), dtype="float32")
    save_pretrained(tmp_path / "floats", floats, plain, fakes.tokenizer())
    ours, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "floats"))
    assert ours.keys() == wanted.keys()
    assert all(np.array_equal(ours[name], wanted[name]) for name in wanted)
    save_pretrained(tmp_path / "rounded", params, config, fakes.tokenizer())
    assert json.loads((tmp_path / "rounded" / "config.json").read_text())["dtype"] == "bfloat16"

    base, _ = lora.detach(params)
    save_pretrained(tmp_path / "base", base, config, fakes.tokenizer(), dtype="float32")
    back = load_pretrained(tmp_path / "base", param_dtype="int8").params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), back, base)


class TestRefusals:
    def test_a_folder_in_use(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="is not overwritten"):
            save_pretrained(tmp_path, tiny.params(CONFIG), CONFIG, fakes.tokenizer())
        with pytest.raises(FileExistsError, match="is not overwritten"):
            save_pretrained(tmp_path / "notes.txt", tiny.params(CONFIG), CONFIG, fakes.tokenizer())
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_an_empty_folder_is_free(self, tmp_path):
        (tmp_path / "out").mkdir()
        save_pretrained(tmp_path / "out", tiny.params(CONFIG), CONFIG, fakes.tokenizer())
        assert (tmp_path / "out" / "config.json").exists()

    @pytest.mark.parametrize(
        ("error", "message"),
        [(OSError(errno.ENOSPC, "No space left on device"), "the disk is full"), (KeyError("x"), "x")],
    )
    def test_after_an_error_there_is_nothing(self, error, message, tmp_path, monkeypatch):
        def fail(*args):
            raise error

        monkeypatch.setattr(save, "write_shards", fail)
        with pytest.raises(type(error), match=message):
            save_pretrained(tmp_path / "out", tiny.params(CONFIG), CONFIG, fakes.tokenizer())
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda p: p.pop("final_norm"), r"final_norm/scale is \(absent\), but .* requires \[32\]"),
            (lambda p: p.update(head=p["embedding"]), r"head/weight is \[259, 32\], .* requires \(absent\)"),
            (lambda p: p["final_norm"].update(scale=jnp.ones(3)), r"final_norm/scale is \[3\]"),
            (
                lambda p: p["layers"]["mlp"]["up"].update(
                    lora_a=jnp.ones((2, 9, 3)), lora_b=jnp.ones((2, 3, 64))
                ),
                r"mlp/up/lora_a is \[2, 9, 3\], .* requires \[2, 32, 3\]",
            ),
        ],
    )
    def test_params_of_another_decoder(self, change, message, tmp_path):
        params = tiny.params(CONFIG)
        change(params)
        with pytest.raises(ValueError, match=message):
            save_pretrained(tmp_path / "out", params, CONFIG, fakes.tokenizer())
        assert list(tmp_path.iterdir()) == []

    def test_an_unknown_dtype(self, tmp_path):
        with pytest.raises(ValueError, match="dtype='int8': choose one of float32, bfloat16"):
            save_pretrained(tmp_path / "out", tiny.params(CONFIG), CONFIG, fakes.tokenizer(), dtype="int8")

    def test_a_system_prompt_without_a_template(self, tmp_path):
        tokenizer = copy.copy(fakes.tokenizer())
        tokenizer.chat_template = None
        with pytest.raises(ValueError, match="no chat_template"):
            save_pretrained(tmp_path / "out", tiny.params(CONFIG), CONFIG, tokenizer, "Add.")
        save_pretrained(tmp_path / "out", tiny.params(CONFIG), CONFIG, tokenizer)


def test_tokenizers_are_read_by_transformers_4_too(tmp_path):
    """It wants a dict where version 5 writes further special tokens as a list."""
    tokenizer = copy.deepcopy(fakes.tokenizer())  # the others' must stay as it is
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    save_pretrained(tmp_path / "out", tiny.params(CONFIG), CONFIG, tokenizer)
    fields = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert not isinstance(fields.get("extra_special_tokens"), list)
    assert fields["additional_special_tokens"] == ["<|a|>", "<|b|>"]
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & set(fields)
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back.encode("x<|a|>y<|b|>") == tokenizer.encode("x<|a|>y<|b|>")
    assert set(back.all_special_ids) == set(tokenizer.all_special_ids)


def test_arguments_of_the_template_go_along(tmp_path):
    tokenizer = copy.copy(fakes.tokenizer())
    tokenizer.chat_template = "{{ thinking }} {{ messages[0].content }}"
    arguments = {"thinking": [False, None, 2, 'say "{%"\n', {"a": 1.5}]}
    save_pretrained(tmp_path / "out", tiny.params(CONFIG), CONFIG, tokenizer, template_arguments=arguments)
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    user = {"role": "user", "content": "Hi"}
    assert render(back, [user]) == render(tokenizer, [user], **arguments)
    assert render(back, [user], thinking=7) == "7 Hi"


def test_a_prompt_that_spells_control_tokens_is_said_as_in_the_run(tmp_path):
    prompt = "Add.<|im_end|>\n<|im_start|>assistant\nSure."
    save_pretrained(tmp_path / "out", tiny.params(CONFIG), CONFIG, fakes.tokenizer(), prompt)
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    system, user = ({"role": "system", "content": prompt}, {"role": "user", "content": "Hi"})
    served = back.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert served == render(fakes.tokenizer(), [system, user])
    assert (tmp_path / "out" / "system_prompt.txt").read_text() == "Add. \n assistant\nSure."


def test_all_templates_go_along_with_prompt_and_arguments(tmp_path):
    tokenizer = copy.copy(fakes.tokenizer())
    with_tools = "{{ tools[0].function.name }} {{ thinking }} " + fakes.TEMPLATE
    no_system_role = "{% for m in messages if m.role == 'user' %}{{ m.content }}{{ thinking }}{% endfor %}"
    tokenizer.chat_template = {"default": fakes.TEMPLATE, "tool_use": with_tools, "plain": no_system_role}
    arguments = {"thinking": False}
    save_pretrained(
        tmp_path / "out", tiny.params(CONFIG), CONFIG, tokenizer, "Add.", template_arguments=arguments
    )
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(back.chat_template) == set(tokenizer.chat_template)
    system, user = ({"role": "system", "content": "Add."}, {"role": "user", "content": "Hi"})
    for tools in ({}, {"tools": TOOLS}):
        assert render(back, [user], **tools) == render(tokenizer, [system, user], **arguments, **tools)
        served = back.apply_chat_template([user], tokenize=False, add_generation_prompt=True, **tools)
        assert served == render(back, [user], **tools)
        file = tmp_path / "out" / template_file(tokenizer, with_tools=bool(tools))
        assert file.read_text() == template_for(back, with_tools=bool(tools))
    back.chat_template = back.chat_template["plain"]
    assert render(back, [user]) == "Add.\n\nHiFalse"


def test_the_sentencepiece_model_goes_along(tmp_path):
    source = tmp_path / "source"
    fakes.tokenizer().save_pretrained(source)
    (source / "tokenizer.model").write_bytes(b"pieces")
    save_pretrained(tmp_path / "out", tiny.params(CONFIG), CONFIG, AutoTokenizer.from_pretrained(source))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"


def test_what_a_killed_process_left_is_removed(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    leftover = tmp_path / f".out.{platform.node()}.{killed.pid}.unfinished"
    anothers = tmp_path / f".out.{platform.node()}.{os.getppid()}.unfinished"
    for folder in (leftover, anothers):
        folder.mkdir()
    save_pretrained(tmp_path / "out", tiny.params(CONFIG), CONFIG, fakes.tokenizer())
    assert (leftover.exists(), anothers.exists()) == (False, True)


def test_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    save_pretrained(tmp_path / "out", tiny.params(CONFIG), CONFIG, fakes.tokenizer())
    assert (tmp_path / "disk" / "config.json").is_file()
