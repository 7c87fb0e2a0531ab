"""A run leaves as a folder: whose weights, which prompt, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from espl_jax import train as loop
from espl_jax.export.export import export
from espl_jax.models import lora
from espl_jax.pretrained.peft import load_adapter
from espl_jax.run import parts, reflection, tasks
from espl_jax.run import weights as run_weights
from espl_jax.run.saved import read_run
from espl_jax.storage.workdir import WorkDir
from espl_jax.text.chat import render
from tests.conftest import run_module
from tests.support import fakes, families, tiny

TOKENS = np.random.default_rng(0).integers(0, 259, (2, 24)).astype(np.int32)
USER = {"role": "user", "content": "1 + 1?"}


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run_weights, "load_pretrained", fakes.load_pretrained)
        monkeypatch.setattr(tasks, "Arithmetic", fakes.Letters)
        monkeypatch.setattr(parts.sharding, "make_mesh", lambda sizes: None)
        monkeypatch.setattr(reflection, "local_reflector", lambda model, **settings: fakes.scripted_replies)
        yield


@pytest.fixture(scope="module")
def workdir(small, tmp_path_factory):
    return fakes.workdir(tmp_path_factory.mktemp("runs") / "espl")


def unasked(folder):
    return render(AutoTokenizer.from_pretrained(folder), [USER])


def under(text):
    return render(fakes.tokenizer(), [{"role": "system", "content": text}, USER])


def test_merged(workdir, tmp_path):
    said = []
    export(workdir, tmp_path / "out", dtype=np.dtype("float32"), say=said.append)
    run = read_run(workdir)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = np.asarray(tiny.logits(run.model.params, run.model.config, TOKENS))
    theirs = families.torch_logits(model, TOKENS).detach().numpy()
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(ours).max()
    # p1 has the best rating.
    assert unasked(tmp_path / "out") == under("Reply with the sum.")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["temperature"] == 1.0 and generation["eos_token_id"] == [257]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "0.5" in card and "prompt p1" in card and "Exported before the test at the end of the run" in card
    assert "prompt p1" in said[1] and f"transformers serve {tmp_path / 'out'}" in said[-1]


def test_adapter(workdir, tmp_path):
    said = []
    export(workdir, tmp_path / "out", format="adapter", prompt="root", base="org/tiny", say=said.append)
    run = read_run(workdir)
    read, scale = load_adapter(tmp_path / "out", run.model.config)
    assert scale == 1.0
    for name in ("lora_a", "lora_b"):
        ours = run.adapters["layers"]["mlp"]["up"][name]
        np.testing.assert_array_equal(read["layers"]["mlp"]["up"][name], ours)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/tiny"
    assert "vllm serve org/tiny --enable-lora" in said[-1]
    assert unasked(tmp_path / "out") == under("Reply.")


def test_dtype_and_prompt(workdir, tmp_path):
    export(workdir, tmp_path / "out", prompt="p2", say=lambda line: None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert unasked(tmp_path / "out") == under("Think {{ twice }}.")
    assert (tmp_path / "out" / "system_prompt.txt").read_text() == "Think {{ twice }}."


def test_prompts_alone(tmp_path):
    """No weights were trained: those of the model that the run began with."""
    workdir = fakes.workdir(tmp_path / "run", mode="evolution")
    export(workdir, tmp_path / "out", dtype="float32", say=lambda line: None)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    reference = fakes.model(remat="none", param_dtype="float32", dtype="float32").params
    embedding = reference["embedding"]["weight"]
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], embedding)
    assert unasked(tmp_path / "out") == under("Reply with the sum.")
    with pytest.raises(ValueError, match="mode=evolution that changes only prompts has no adapters"):
        export(workdir, tmp_path / "adapter", format="adapter", say=lambda line: None)


def test_all_weights(tmp_path):
    workdir = fakes.workdir(tmp_path / "run", mode="rl", lora__rank=0)
    export(workdir, tmp_path / "out", dtype="float32", say=lambda line: None)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    params = fakes.model(remat="none", param_dtype="float32", dtype="float32").params
    embedding = params["embedding"]["weight"]
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], embedding + 0.5)
    with pytest.raises(ValueError, match=r"trains all weights \(lora.rank=0\) has no adapters"):
        export(workdir, tmp_path / "adapter", format="adapter", say=lambda line: None)


def test_adapters_of_int8_weights(tmp_path):
    """Merged into the weights that int8 stands for; adapters alone are as they were trained."""
    workdir = fakes.workdir(tmp_path / "run", mode="rl", model__param_dtype="int8")
    export(workdir, tmp_path / "out", dtype="float32", say=lambda line: None)
    run = read_run(workdir)
    assert run.model.params["embedding"]["weight"].dtype == np.int8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = np.asarray(tiny.logits(run.model.params, run.model.config, TOKENS))
    theirs = families.torch_logits(model, TOKENS).detach().numpy()
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(ours).max()
    export(workdir, tmp_path / "adapter", format="adapter", base="org/tiny", say=lambda line: None)
    read, _ = load_adapter(tmp_path / "adapter", run.model.config)
    tiny.assert_trees_close(read, run.adapters, 1e-6)


def test_beside_the_run(workdir, tmp_path):
    config = fakes.config().to_dict()
    with WorkDir(workdir, config) as folder:
        folder.append("metrics", {"iteration": 3, "reward": 0.9})
        export(workdir, tmp_path / "out", say=lambda line: None)
    # The figures are the checkpoint's, not those of what came after.
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| reward    | 0.5 |" in card and "0.9 |" not in card


def test_a_test_that_was_of_fewer_iterations_is_not_shown(tmp_path):
    workdir = fakes.workdir(tmp_path / "run", num_iterations=5)
    (workdir / "results.json").write_text('{"deployed": {"id": "p1"}, "test": {"initial": {}}}')
    export(workdir, tmp_path / "out", say=lambda line: None)
    assert "there are no test results" in (tmp_path / "out" / "README.md").read_text()


def test_refusals(workdir, tmp_path):
    with pytest.raises(ValueError, match="format='onnx': choose one of merged, adapter"):
        export(workdir, tmp_path / "out", format="onnx")
    with pytest.raises(ValueError, match="prompt='p9': no such prompt; give deployed, root, or one of p0"):
        export(workdir, tmp_path / "out", prompt="p9", say=lambda line: None)
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        export(tmp_path, tmp_path / "out", say=lambda line: None)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="is not overwritten"):
        export(workdir, tmp_path / "full", say=lambda line: None)


def command(*args):
    return run_module("espl_jax.export", *args, JAX_PLATFORMS="")


@pytest.mark.slow
def test_the_command_says_what_is_wrong(tmp_path):
    result = command(f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}")
    assert result.returncode == 1
    assert "has no config.json; give the --workdir of a run" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_run_from_its_beginning(tmp_path):
    with open(tmp_path / "log", "w") as log:
        results = loop.train(fakes.config(), tmp_path / "run", Console(file=log, width=200))
    export(tmp_path / "run", tmp_path / "out", dtype="float32", say=lambda line: None)
    run = read_run(tmp_path / "run")
    assert run.prompt().id == results["deployed"]["id"]
    assert unasked(tmp_path / "out") == under(run.prompt().render())
    base, adapters = lora.detach(run.model.params)
    exported = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    node = base["layers"]["mlp"]["up"]["weight"][0]
    update = adapters["layers"]["mlp"]["up"]
    expected = node + update["lora_a"][0] @ update["lora_b"][0]
    np.testing.assert_allclose(exported, expected.T, atol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| trained |" in card and "Training rollouts" in card


def test_it_draws_as_the_run_did_and_not_as_its_makers_say(tmp_path, monkeypatch):
    makers = {"bos_token_id": 5, "repetition_penalty": 1.1, "temperature": 0.6, "top_k": 20}

    def load(*args, **kwargs):
        return dataclasses.replace(fakes.load_pretrained(*args, **kwargs), generation=makers)

    monkeypatch.setattr(run_weights, "load_pretrained", load)
    for t in (0.7, 0.0):
        cut = {"top_p": 0.9, "top_k": 7, "min_p": 0.01}
        changes = {f"sampling__{name}": value for name, value in cut.items()}
        run = fakes.workdir(tmp_path / f"run{t}", sampling__temperature=t, mode="evolution", **changes)
        export(run, tmp_path / f"out{t}", say=lambda line: None)
        written = json.loads((tmp_path / f"out{t}" / "generation_config.json").read_text())
        drawn = {"do_sample": True, "temperature": t, **cut} if t else {"do_sample": False}
        expected = {"bos_token_id": 5, "eos_token_id": [257], **drawn}
        assert {name: value for name, value in written.items() if name != "pad_token_id"} == expected


def test_arguments_of_the_template(tmp_path):
    arguments = '{"enable_thinking": false}'
    run = fakes.workdir(tmp_path / "run", model__chat_template_kwargs=arguments)
    export(run, tmp_path / "out", say=lambda line: None)
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert template.startswith("{% if enable_thinking is not defined %}\n{% set enable_thinking = false %}")


def test_an_environment_with_tools(tmp_path, monkeypatch):
    own = {"environment__name": "tests.support.fakes:Caller"}
    run = fakes.workdir(tmp_path / "run", **own)
    templates = {"default": fakes.TEMPLATE, "tool_use": "{{ tools }}" + fakes.TEMPLATE}
    monkeypatch.setattr(fakes.tokenizer(), "chat_template", templates)
    export(run, tmp_path / "out", format="adapter", say=lambda line: None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"name": "add"' in card
    assert "--chat-template out/additional_chat_templates/tool_use.jinja" in card
    monkeypatch.delattr(fakes, "Caller")
    said = []
    export(run, tmp_path / "elsewhere", say=said.append)
    assert any("no tools" in line and "tests.support.fakes:Caller" in line for line in said)


def test_a_run_that_began_with_an_adapter(tmp_path, monkeypatch):
    source = tmp_path / "adapter"
    source.mkdir()
    (source / "adapter_config.json").touch()
    run = fakes.workdir(tmp_path / "run", model__source=str(source))
    with pytest.raises(ValueError, match=r"started from the adapter .*, merged into its base"):
        export(run, tmp_path / "out", format="adapter", say=lambda line: None)
    export(run, tmp_path / "out", format="adapter", base="org/merged", say=lambda line: None)
