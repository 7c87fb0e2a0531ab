import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from espl_jax.models import transformer
from espl_jax.models.params import abstract, to_storage
from espl_jax.parallel.sharding import make_mesh
from espl_jax.pretrained import hf_folder
from espl_jax.pretrained.load import Pretrained, load_pretrained
from espl_jax.pretrained.peft import save_adapter
from espl_jax.pretrained.save import save_pretrained
from tests.support import fakes, families, tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def llama():
    """A tiny Llama of transformers, tied."""
    hf_config = families.draw_hf_config("llama", 1)
    hf_config.update({"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False})
    hf_config.update({"vocab_size": fakes.CONFIG.vocab_size})  # the tokenizer's
    return families.torch_model(hf_config, 0)


@pytest.fixture
def folder(llama, tmp_path):
    """It, as save_pretrained writes it, with a tokenizer."""
    llama.save_pretrained(tmp_path)
    fakes.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change, name="model.safetensors"):
    """Saves the tensors of a file anew after `change(tensors)`."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class TestWeights:
    @pytest.mark.parametrize("family", families.FAMILIES)
    def test_every_family_as_transformers_saves_it(self, family, tmp_path):
        hf_config = families.draw_hf_config(family, 3)
        model = families.torch_model(hf_config, 0)
        model.save_pretrained(tmp_path, max_shard_size="3KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        config = hf_folder.read_config(tmp_path, matmul_precision="highest")
        assert config == families.our_config(hf_config, matmul_precision="highest")
        params = hf_folder.read_params(tmp_path, config, None)
        jax.tree.map(np.testing.assert_array_equal, params, families.our_params(model, config))

    @pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "deepseek_v3"])
    @pytest.mark.parametrize("sizes", [None, {"expert": 2, "fsdp": 2, "tensor": 2}])
    def test_int8(self, family, sizes, tmp_path):
        """The params of float32, rounded; the rest stays float32."""
        families.torch_model(families.draw_hf_config(family, 3), 0).save_pretrained(tmp_path)
        config = hf_folder.read_config(tmp_path, param_dtype="int8")
        params = hf_folder.read_params(tmp_path, config, sizes and make_mesh(sizes))
        plain = hf_folder.read_params(tmp_path, config.replace(param_dtype="float32"), None)
        jax.tree.map(np.testing.assert_array_equal, params, to_storage(jax.device_get(plain), config))
        dtypes = jax.tree.map(lambda x: str(x.dtype), params)
        assert dtypes == jax.tree.map(lambda weight: weight.dtype, abstract(config))

    @pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
    def test_dtypes_of_files_and_of_params(self, folder, llama, stored, wanted):
        def narrow(tensors):
            tensors.update({name: x.astype(jnp.dtype(stored)) for name, x in tensors.items()})

        rewrite(folder, narrow)
        config = hf_folder.read_config(folder, param_dtype=wanted)
        params = hf_folder.read_params(folder, config, None)
        expected = families.our_params(llama, config)
        for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            assert ours.dtype == wanted
            np.testing.assert_array_equal(ours, theirs.astype(jnp.dtype(stored)).astype(jnp.dtype(wanted)))

    @pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
    def test_the_text_half_of_a_gemma_that_sees(self, prefix, tmp_path):
        hf_config = families.draw_hf_config("gemma3", 2)
        model = families.torch_model(hf_config, 0)
        model.save_pretrained(tmp_path)
        config = hf_folder.read_config(tmp_path)
        vision = prefix.removesuffix("language_model.model.").removesuffix("language_model.")

        def lengthen(tensors):
            for name in list(tensors):
                longer = re.sub(r"^model\.", prefix, name)
                if prefix.startswith("language_model."):
                    longer = re.sub(r"^lm_head\.", "language_model.lm_head.", longer)
                tensors[longer] = tensors.pop(name)
            tensors[f"{vision}vision_tower.vision_model.post_layernorm.weight"] = np.ones(3, np.int8)
            tensors[f"{vision}multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(3, np.float32)

        rewrite(tmp_path, lengthen)
        text = json.loads((tmp_path / "config.json").read_text())
        whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
        whole["tie_word_embeddings"] = config.tied_head
        (tmp_path / "config.json").write_text(json.dumps(whole))
        assert hf_folder.read_config(tmp_path) == config
        params = hf_folder.read_params(tmp_path, config, None)
        jax.tree.map(np.testing.assert_array_equal, params, families.our_params(model, config))

    def test_constants_and_the_second_copy_of_a_tied_embedding_are_ignored(self, folder, llama):
        def add(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)

        rewrite(folder, add)
        config = hf_folder.read_config(folder)
        assert "head" not in hf_folder.read_params(folder, config, None)

    def test_a_head_that_is_not_the_embedding_is_kept(self, folder, llama):
        """As transformers does, whatever the config says."""

        def add(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.1

        rewrite(folder, add)
        model = load_pretrained(folder)
        assert not model.config.tied_head
        tokens = np.arange(12).reshape(1, -1)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        expected = families.torch_logits(theirs, tokens).detach().numpy()
        ours = tiny.logits(model.params, model.config, tokens)
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())

    @pytest.mark.parametrize("dtype", [np.int32, np.float64])
    @pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
    def test_a_tied_head_of_an_unsupported_dtype_is_refused(self, folder, name, dtype):
        def change(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
            tensors[name] = tensors[name].astype(dtype)

        rewrite(folder, change)
        with pytest.raises(ValueError, match=f"{name} is stored as .*, and only BF16, F16, F32"):
            load_pretrained(folder)

    def test_either_name_of_a_tied_embedding_will_do(self, folder):
        before = load_pretrained(folder).params["embedding"]["weight"]
        rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
        model = load_pretrained(folder)
        assert model.config.tied_head
        np.testing.assert_array_equal(model.params["embedding"]["weight"], before)

    def test_all_of_mistral_again_in_one_file_is_not_looked_at(self, folder):
        (folder / "consolidated.safetensors").write_bytes(b"not read")
        assert load_pretrained(folder).config.tied_head

    def test_missing(self, folder):
        gone = [
            f"model.layers.{i}.mlp.{name}_proj.weight" for i in range(2) for name in ("down", "gate", "up")
        ]
        rewrite(folder, lambda tensors: [tensors.pop(name) for name in gone])
        with pytest.raises(ValueError, match=r"6 tensors .* are missing") as caught:
            load_pretrained(folder)
        assert f"({', '.join(gone[:5])}, ...)" in str(caught.value)

    def test_a_head_that_is_missing(self, folder):
        edit_json(folder / "config.json", tie_word_embeddings=False)
        with pytest.raises(ValueError, match=r"1 tensors \(lm_head\.weight\) are missing"):
            load_pretrained(folder)

    def test_unexpected(self, folder):
        rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.sinks": np.ones(3, np.float32)}))
        message = r"1 tensors \(model\.layers\.0\.self_attn\.sinks\) are not part of a llama decoder"
        with pytest.raises(ValueError, match=message):
            load_pretrained(folder)

    def test_wrong_shape(self, folder):
        rewrite(folder, lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)}))
        width = json.loads((folder / "config.json").read_text())["hidden_size"]
        with pytest.raises(
            ValueError, match=rf"model\.norm\.weight has shape \[3\], but config.json requires \[{width}\]"
        ):
            load_pretrained(folder)

    def test_dtypes_that_are_not_read(self, folder):
        rewrite(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.int8)}))
        with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as I8, and only BF16, F16, F32"):
            load_pretrained(folder)

    @pytest.mark.parametrize("kept", [0, 4, 100, -1, -2000])
    def test_truncated(self, folder, kept):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"model\.safetensors .*truncated.*download it again"):
            load_pretrained(folder)

    @pytest.mark.parametrize(
        "header",
        [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"\xff"],
    )
    def test_damaged_headers(self, folder, header):
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
        with pytest.raises(ValueError, match=r"model\.safetensors .* is not a valid safetensors file"):
            load_pretrained(folder)

    def test_a_file_that_the_index_names_is_missing(self, folder):
        (folder / INDEX).write_text(
            json.dumps({"weight_map": {"a": "one.safetensors", "b": "model.safetensors"}})
        )
        with pytest.raises(
            FileNotFoundError, match=r"names 2 files, of which 1 .*one\.safetensors; download"
        ):
            load_pretrained(folder)

    @pytest.mark.parametrize(
        "index", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}']
    )
    def test_damaged_index(self, folder, index):
        (folder / INDEX).write_text(index)
        with pytest.raises(ValueError, match=f"{INDEX} does not say which .safetensors files"):
            load_pretrained(folder)

    def test_pickled_weights_are_refused(self, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(
            FileNotFoundError, match=r"but pytorch_model\.bin; .*pickled files can run any code"
        ):
            load_pretrained(folder)


class TestConfig:
    def test_unsupported_architecture(self, folder):
        edit_json(folder / "config.json", model_type="mamba")
        with pytest.raises(
            ValueError, match=f"{folder}: model_type='mamba' is not supported; supported: llama"
        ):
            load_pretrained(folder)

    @pytest.mark.parametrize("inside", [False, True])
    def test_quantized(self, folder, inside):
        fields = {"quantization_config": {"quant_method": "gptq"}}
        edit_json(folder / "config.json", **({"text_config": fields} if inside else fields))
        with pytest.raises(
            ValueError, match=r"quant_method='gptq' is not supported.*use the unquantized model"
        ):
            load_pretrained(folder)

    def test_no_config(self, folder):
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
            load_pretrained(folder)
        (folder / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json is not JSON"):
            load_pretrained(folder)


class TestTokenizer:
    MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Café? 12+3"})

    @pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
    def test_tokens_and_template(self, folder, place):
        if place == "tokenizer_config.json":
            template = (folder / "chat_template.jinja").read_text()
            (folder / "chat_template.jinja").unlink()
            edit_json(folder / "tokenizer_config.json", chat_template=template)
        ours, theirs = hf_folder.read_tokenizer(folder), fakes.tokenizer()
        asked = {"add_generation_prompt": True, "return_dict": False}
        assert ours.apply_chat_template(self.MESSAGES, **asked) == theirs.apply_chat_template(
            self.MESSAGES, **asked
        )
        assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)

    def test_a_model_without_a_template_loads(self, folder):
        (folder / "chat_template.jinja").unlink()
        model = load_pretrained(folder)
        assert model.tokenizer.chat_template is None
        assert model.tokenizer.decode(model.tokenizer.encode("Café")) == "Café"

    def test_sentencepiece(self, folder):
        import io

        import sentencepiece

        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat 0123456789"] * 9),
            model_writer=file,
            vocab_size=50,
            model_type="bpe",
            minloglevel=2,
        )
        for path in folder.glob("tokenizer*"):
            path.unlink()
        (folder / "tokenizer.model").write_bytes(file.getvalue())
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        text = "the mat sat on 12"
        reference = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
        tokenizer = hf_folder.read_tokenizer(folder)
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)
        assert tokenizer.decode(reference.encode(text)) == text

    def test_none_or_damaged(self, folder):
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=f"{folder}: its tokenizer cannot be read"):
            load_pretrained(folder)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"has no tokenizer \(none of tokenizer\.json"):
            _ = load_pretrained(folder).tokenizer

    def test_weights_and_config_alone(self, folder, llama, tmp_path_factory):
        """They load, and are saved again; only what needs a tokenizer asks for it."""
        for path in folder.iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                path.unlink()
        edit_json(folder / "config.json", eos_token_id=5)
        model = load_pretrained(folder)
        jax.tree.map(np.testing.assert_array_equal, model.params, families.our_params(llama, model.config))
        assert model.stop_ids == (5,)
        for asked in (model, dataclasses.replace(model, params={})):
            with pytest.raises(
                FileNotFoundError, match=f"{folder} has no tokenizer .*; copy the tokenizer of its"
            ):
                _ = asked.tokenizer
        again = tmp_path_factory.mktemp("again")
        save_pretrained(
            again, model.params, model.config, None, model_card="# A", generation=model.generation
        )
        assert sorted(path.name for path in again.iterdir()) == [
            *("README.md", "config.json", "generation_config.json", "model.safetensors")
        ]
        back = load_pretrained(again)
        jax.tree.map(np.testing.assert_array_equal, back.params, model.params)
        assert (back.config, back.stop_ids) == (model.config, (5,))
        with pytest.raises(ValueError, match="tokenizer=None: a system prompt needs"):
            save_pretrained(tmp_path_factory.mktemp("b"), model.params, model.config, None, "Add.")

    def test_a_template_in_a_file_of_its_own(self, folder):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        assert load_pretrained(folder).tokenizer.chat_template is None
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
        assert load_pretrained(folder).tokenizer.chat_template == "{{ messages }}"

    def test_code_in_the_folder_is_not_run(self, folder):
        (folder / "own.py").write_text("raise SystemExit('ran')")
        edit_json(
            folder / "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["own.T", "own.T"]},
            tokenizer_class="T",
        )
        edit_json(folder / "config.json", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
        assert load_pretrained(folder).tokenizer.encode("a") == fakes.tokenizer().encode("a")
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text("{}")
        with pytest.raises(ValueError, match=r"custom code.*, which is never run; save it again"):
            load_pretrained(folder)


class TestVocabulary:
    """Tokens past the embedding, of 259 rows."""

    def add(self, folder, *tokens, **changes):
        tokenizer = copy.deepcopy(fakes.tokenizer())
        tokenizer.add_tokens(list(tokens))
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        for path in folder.glob("*token*"):
            path.unlink()
        tokenizer.save_pretrained(folder)

    END, PAD = AddedToken("<|end|>", special=True), AddedToken("[PAD]", special=True)

    def test_that_the_template_writes(self, folder):
        self.add(folder, self.PAD, self.END, chat_template=fakes.TEMPLATE.replace("<|im_end|>", "<|end|>"))
        with pytest.raises(
            ValueError, match=rf"{folder}: .*'<\|end\|>' has id 260, past .* vocab_size=259, .*template"
        ):
            load_pretrained(folder)

    def test_that_the_template_puts_together(self, folder):
        self.add(
            folder, AddedToken("<user>", special=True), chat_template="{{ '<' + messages[0].role + '>a' }}"
        )
        with pytest.raises(ValueError, match="'<user>' has id 259"):
            load_pretrained(folder)

    def test_that_texts_contain(self, folder):
        self.add(folder, "<think>")
        with pytest.raises(
            ValueError, match=r"'<think>' has id 259, .*any text may contain it; use the tokenizer"
        ):
            load_pretrained(folder)

    @pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
    def test_that_end_replies(self, folder, place):
        self.add(folder, self.END)
        (folder / "generation_config.json").write_text("{}")
        edit_json(folder / place, eos_token_id=[257, 259])
        with pytest.raises(
            ValueError, match=r"eos_token_id=259 \('<\|end\|>'\) is outside .* vocab_size=259"
        ):
            load_pretrained(folder)
        for path in folder.glob("*token*"):
            path.unlink()
        with pytest.raises(ValueError, match="eos_token_id=259 is outside"):
            load_pretrained(folder)

    def test_that_nothing_brings_are_let_pass(self, folder):
        """Gemma 3 1B's tokenizer has one for images; many have a padding token that somebody added."""
        self.add(folder, self.PAD)
        model = load_pretrained(folder)
        ids = model.tokenizer.encode("a[PAD]")
        assert ids[-1] == 259
        with pytest.raises(ValueError, match="tokens: token id 259 is outside the model's vocabulary"):
            transformer.logits(model.params, model.config, jnp.array([ids]))

    def test_of_an_adapters_own_tokenizer(self, folder, tmp_path_factory):
        base = load_pretrained(folder)
        adapter = tmp_path_factory.mktemp("adapters") / "a"
        save_adapter(adapter, tiny.adapters(base.config), base.config, base.tokenizer, base=str(folder))
        assert load_pretrained(adapter).config.lora_scale == 1.0
        self.add(adapter, self.END, chat_template="<|end|>{{ messages[0].content }}")
        with pytest.raises(ValueError, match=rf"{adapter}: the tokenizer's '<\|end\|>' has id 259"):
            load_pretrained(adapter)


class TestStopIds:
    @pytest.mark.parametrize(
        ("generation", "config", "expected"),
        [
            ({"eos_token_id": [3, 5]}, {}, (3, 5, 257)),
            ({"eos_token_id": 3, "temperature": 0.6}, {"eos_token_id": 4}, (3, 257)),
            ({}, {"eos_token_id": 4}, (4, 257)),
            (None, {"eos_token_id": [4, 5]}, (4, 5, 257)),
            (None, {"eos_token_id": None}, (257,)),
        ],
    )
    def test_all_that_the_folder_names(self, folder, generation, config, expected):
        assert fakes.tokenizer().eos_token_id == 257
        edit_json(folder / "config.json", **config)
        path = folder / "generation_config.json"
        path.unlink(missing_ok=True)
        if generation is not None:
            path.write_text(json.dumps(generation))
        model = load_pretrained(folder)
        assert model.stop_ids == expected
        assert model.generation.items() >= (generation or {}).items()

    def test_without_any(self):
        params, config = {}, fakes.CONFIG
        assert Pretrained(params, config, fakes.tokenizer()).stop_ids == (257,)


def test_a_mesh_gives_the_same_model(folder):
    alone, spread = load_pretrained(folder), load_pretrained(folder, mesh=make_mesh())
    jax.tree.map(np.testing.assert_array_equal, alone.params, spread.params)
    assert spread.params["embedding"]["weight"].sharding.mesh.size == 8


def test_loading_needs_no_torch(folder):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from espl_jax.pretrained.load import load_pretrained\n"
        "model = load_pretrained(sys.argv[1])\n"
        "assert model.tokenizer.decode(model.tokenizer.encode('Café')) == 'Café'\n"
    )
    subprocess.run([sys.executable, "-c", code, folder], check=True, cwd=Path(__file__).parents[2])
