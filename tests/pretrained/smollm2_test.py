"""The real model: SmolLM2-135M-Instruct against transformers and torch, which read the same GGUF file."""

import functools

import gguf
import jax
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from espl_jax.models import lora
from espl_jax.pretrained import smollm2
from espl_jax.pretrained.load import load_pretrained
from espl_jax.sampling import draw
from espl_jax.sampling.buckets import pad_right
from espl_jax.sampling.generate import generate
from tests.support import ragged_tree, tiny, torch_llama
from tests.support.flat import compiled_gradients, sample_tree

TEXT = (
    "A train leaves the station at noon and travels north at sixty miles an hour. Two hours later "
    "another one follows it on the same track at eighty miles an hour. To find out when the second "
    "train catches up with the first, note that the first is one hundred and twenty miles ahead when "
    "the second one leaves. The gap closes by twenty miles every hour, so it takes 120 / 20 = 6 hours. "
    "They meet at 8 p.m., 480 miles north of the station. Now suppose that the first train stops for "
    "half an hour on its way. Then the second one has thirty miles less to make up for, and 90 / 20 = "
    "4.5 hours are enough; they meet at half past six in the evening. In general, the time is the gap "
    "divided by the difference of the speeds, whatever the units are, as long as they are the same for "
    "both trains, and it does not depend on where the station lies."
)


@pytest.fixture(scope="module")
def model():
    return load_pretrained("smollm2")


@pytest.fixture(scope="module")
def reference():
    """transformers' own reading of the file. from_pretrained would read the same, but wants accelerate."""
    path = str(smollm2.find_gguf())
    with pytest.MonkeyPatch.context() as patch:  # read once, not three times; one table, not one a module
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        config = LlamaConfig(**load_gguf_checkpoint(path)["config"])
        torch_model = LlamaForCausalLM(config).float().eval()
        checkpoint = load_gguf_checkpoint(path, return_tensors=True, model_to_load=torch_model)
    missing, unexpected = torch_model.load_state_dict(checkpoint["tensors"], strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    torch_model.tie_weights()
    return torch_model


@pytest.fixture(scope="module")
def text_tokens(model):
    tokens = model.tokenizer.encode(TEXT)
    assert len(tokens) >= 190
    return np.array(tokens, np.int32)


def text_tree(tokens, shape, widths, seed=0):
    """A ragged tree cut out of the text: system prompts, problems and rollouts begin anywhere in it."""
    tree = ragged_tree.random_tree(seed, len(tokens) - max(widths) - 1, shape, widths)

    def run(starts, width):
        return tokens[np.asarray(starts)[..., :1] + np.arange(width)]

    system, problem, new = widths
    rollouts = run(tree.targets, new + 1)
    # A group's rollouts follow the same last token of their problem.
    rollouts[..., 0] = rollouts[:, :, :1, 0]
    return tree._replace(
        system_tokens=run(tree.system_tokens, system),
        problem_tokens=run(tree.problem_tokens, problem),
        inputs=rollouts[..., :-1],
        targets=rollouts[..., 1:],
    )


@pytest.mark.slow
def test_logits(model, reference, text_tokens):
    config = model.config.replace(remat="none")
    with torch.no_grad():
        expected = torch_llama.logits(reference, text_tokens[None]).numpy()
    ours = np.asarray(tiny.logits(model.params, config, text_tokens[None]))
    gap = np.abs(ours - expected).max()
    print(f"{len(text_tokens)} tokens, logits within {gap:.1e} of torch's")
    assert gap < 1e-3
    np.testing.assert_array_equal(ours.argmax(-1), expected.argmax(-1))


@pytest.mark.slow
def test_tree_against_flat(model, text_tokens):
    config = model.config.replace(remat="none")
    tree = text_tree(text_tokens, (2, 2, 2), (48, 24, 32))
    flat = np.asarray(tiny.logits(model.params, config, ragged_tree.flatten(tree).tokens))
    expected = ragged_tree.pick(flat, tree).reshape(*tree.mask.shape, -1)[tree.mask]
    levels = tree.system_tokens, tree.problem_tokens.reshape(4, -1), tree.inputs.reshape(8, -1)
    lengths = tree.system_lengths, tree.problem_lengths.reshape(-1), tree.mask.sum(-1).reshape(-1)
    hidden, _ = tiny.jitted_forward_tree(model.params, config, levels, lengths)
    ours = np.asarray(tiny.unembed(model.params, config, hidden[2])).reshape(*tree.mask.shape, -1)[tree.mask]
    gap = np.abs(ours - expected).max() / np.abs(expected).max()
    print(f"tree against flat: {gap:.1e} of the largest logit")
    assert gap < 1e-4


@pytest.mark.slow
def test_cached_decoding(model, text_tokens):
    """Greedy through `generate`, and every position again without a cache."""
    prompt = text_tokens[:60].tolist()
    count = 16
    drawn = generate(
        model.params,
        model.config,
        [prompt],
        key=jax.random.key(0),
        group_size=1,
        max_new_tokens=count,
        temperature=0.0,
    )
    tokens = drawn.tokens[0, 0]
    whole = np.append(prompt, tokens)[None].astype(np.int32)
    scores = tiny.logits(model.params, model.config.replace(remat="none"), whole)[0, len(prompt) - 1 : -1]
    np.testing.assert_array_equal(tokens, np.asarray(scores).argmax(-1))
    expected = np.asarray(jax.nn.log_softmax(scores))[np.arange(count), tokens]
    gap = np.abs(drawn.untruncated_logprobs[0, 0] - expected).max()
    print(f"cached against uncached: logprobs within {gap:.1e}")
    assert gap < 1e-4


NUMERICS = {
    "float32": ({}, 1e-4),
    "bfloat16": ({"dtype": "bfloat16", "param_dtype": "bfloat16"}, 0.02),
    "bfloat16 products": ({"matmul_precision": "bfloat16"}, 0.02),
}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("numerics", NUMERICS)
def test_sampler_and_trainer_logprobs(text_tokens, numerics, temperature):
    """Sampled over caches in chunks; scored flat, and over the tree by the policy gradient."""
    changes, tolerance = NUMERICS[numerics]
    model = load_pretrained("smollm2", **changes)
    adapters = lora.init(jax.random.key(0), model.config, 4)
    params = lora.attach(model.params, adapters)
    system = [text_tokens[:40].tolist(), text_tokens[50:75].tolist()]
    problem = [[text_tokens[100:120].tolist(), text_tokens[130:137].tolist()]] * 2
    m, b, n = np.ogrid[:2, :2, :2]
    keys = draw.row_keys(jax.random.key(1, impl="threefry2x32"), m, b, n)
    drawn = sample_tree(
        params, model.config, system, problem, keys, max_new_tokens=32, temperature=temperature, chunk=16
    )
    tree = as_tree(system, problem, drawn)

    flat = ragged_tree.flatten(tree)
    own = np.asarray(tiny.token_logprobs(params, model.config, flat.tokens, temperature))
    gap = np.abs(ragged_tree.pick(own, tree).reshape(tree.mask.shape) - drawn.logprobs)[tree.mask]
    _, metrics = compiled_gradients(
        adapters,
        model.params,
        None,
        tree.train_batch(),
        model.config,
        temperature=temperature,
        microbatch_rows=4,
    )
    of_tree = float(metrics["log_ratio_abs"])
    print(
        f"{numerics}, T={temperature}: sampler - flat {gap.mean():.1e} (max {gap.max():.1e}), "
        f"tree {of_tree:.1e}"
    )
    assert gap.mean() < tolerance
    assert of_tree < tolerance


def as_tree(system, problem, drawn):
    """The tree of what was sampled, all rollouts of equal weight."""
    system_tokens, system_lengths = pad_right(system)
    problem_tokens, problem_lengths = pad_right([tokens[:-1] for lane in problem for tokens in lane])
    shape = drawn.lengths.shape
    last = np.array([[tokens[-1] for tokens in lane] for lane in problem], np.int32)[..., None, None]
    last = np.broadcast_to(last, (*shape, 1))
    return ragged_tree.Tree(
        system_tokens=system_tokens,
        system_lengths=system_lengths,
        problem_tokens=problem_tokens.reshape(*shape[:2], -1),
        problem_lengths=problem_lengths.reshape(shape[:2]),
        inputs=np.concatenate([last, drawn.tokens[..., :-1]], axis=-1),
        targets=drawn.tokens,
        mask=np.arange(drawn.tokens.shape[-1]) < drawn.lengths[..., None],
        sampler_logprobs=drawn.logprobs,
        cutoffs=None,
        advantages=np.ones(shape, np.float32),
        num_rollouts=np.float32(np.prod(shape)),
    )


@pytest.fixture(scope="module")
def tree(model, text_tokens):
    """A small ragged one, near policy."""
    tree = text_tree(text_tokens, (2, 2, 2), (20, 12, 16))
    own = tiny.token_logprobs(model.params, model.config, ragged_tree.flatten(tree).tokens, 0.7)
    return ragged_tree.on_policy(tree, own, noise=0.2)


@pytest.mark.slow
def test_gradients_of_adapters(model, reference, tree):
    config = model.config.replace(lora_scale=0.5)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda w: rng.normal(0, 0.05, w.shape).astype(np.float32), lora.abstract_adapters(config, 4)
    )
    loss, expected = torch_llama.lora_gradients(reference, adapters, 0.5, tree, temperature=0.7)
    grads, metrics = compiled_gradients(
        adapters, model.params, None, tree.train_batch(), config, temperature=0.7, microbatch_rows=4
    )
    assert metrics["loss"] == pytest.approx(loss, rel=1e-3)
    errors = jax.tree.leaves(jax.tree.map(tiny.relative_error, grads, expected))
    print(f"{len(errors)} tensors of adapters: relative errors up to {max(errors):.1e}")
    tiny.assert_trees_close(grads, expected, 1e-3)


@pytest.mark.slow
def test_gradients_of_all_weights(model, reference, tree):
    loss, expected = torch_llama.full_gradients(reference, tree, temperature=0.7)
    grads, metrics = compiled_gradients(
        model.params, None, None, tree.train_batch(), model.config, temperature=0.7, microbatch_rows=2
    )
    assert metrics["loss"] == pytest.approx(loss, rel=1e-3)
    ours = torch_llama.to_names(grads, model.config)
    assert set(ours) == set(expected)
    errors = {name: tiny.relative_error(ours[name], expected[name]) for name in expected}
    print(f"{len(errors)} tensors: relative errors up to {max(errors.values()):.1e}")
    assert max(errors.values()) < 1e-3, max(errors, key=errors.get)
