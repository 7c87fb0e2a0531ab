"""Every family leaves as transformers and PEFT load it: their logits are ours."""

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from espl_jax.models import lora
from espl_jax.pretrained.load import load_pretrained
from espl_jax.pretrained.peft import load_adapter, save_adapter
from espl_jax.pretrained.save import save_pretrained
from tests.support import fakes, families, tiny

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 24)).astype(np.int32)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )


def torch_logits(model):
    with torch.no_grad():
        return families.torch_logits(model, TOKENS).numpy()


def same(ours, others):
    return jax.tree.structure(ours) == jax.tree.structure(others) and all(
        x.dtype == y.dtype == np.float32 and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(others), strict=True)
    )


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(x, marks=() if x in ("gemma3", "qwen3", "qwen3_moe", "gpt_oss") else pytest.mark.slow)
        for x in families.FAMILIES
    ],
)
def test_logits(family, request, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    seed = request.config.getoption("family_seed")
    # The tokenizer's ids must be the model's. Rank 3 times 0.7 makes an alpha that is no integer.
    config = families.our_config(families.draw_hf_config(family, seed), lora_scale=0.7, remat="none")
    config = config.replace(vocab_size=fakes.CONFIG.vocab_size)
    params = tiny.params(config)
    targets = lora.targets_of(config)
    if family == "qwen3_moe":  # PEFT adapts no module of this kind
        targets = [x for x in targets if x != "router"]
    adapters = tiny.adapters(config, targets=targets)
    policy = lora.attach(params, adapters)
    merged, base, adapter, again = (tmp_path / name for name in ("merged", "base", "adapter", "again"))
    save_pretrained(merged, policy, config, fakes.tokenizer())
    save_pretrained(base, params, config, fakes.tokenizer())
    save_adapter(adapter, adapters, config, fakes.tokenizer(), base=str(base))

    ours = np.asarray(tiny.logits(policy, config, TOKENS))
    tolerance = 1e-4 * np.abs(ours).max()
    unadapted = load(base)
    # Adapters that do nothing would pass what follows.
    assert np.abs(torch_logits(unadapted) - ours).max() > 100 * tolerance
    with_adapters = peft.PeftModel.from_pretrained(unadapted, adapter)
    for name, model in {"merged": load(merged), "adapter": with_adapters}.items():
        gap = np.abs(torch_logits(model) - ours).max()
        print(f"{family}, {name}: {gap / np.abs(ours).max():.1e} of the largest logit")
        assert gap < tolerance, name

    # PEFT knows every tensor of ours, and we those that it writes.
    tensors = load_file(adapter / "adapter_model.safetensors")
    loaded = peft.set_peft_model_state_dict(with_adapters, {k: torch.tensor(v) for k, v in tensors.items()})
    assert loaded.unexpected_keys == []
    with_adapters.save_pretrained(again)
    folders = [adapter, again]
    if family == "qwen3_moe":
        # transformers fuses the experts of a layer, and PEFT saves their adapters fused.
        with pytest.raises(ValueError, match=r"rank_pattern=.*gate_up_proj.* is not supported; merge"):
            load_adapter(folders.pop(), config)
    for folder in folders:
        read, scale = load_adapter(folder, config)
        assert scale == pytest.approx(0.7) and same(read, adapters)

    # And all of it comes back as one model.
    for folder in (merged, adapter):
        back = load_pretrained(folder)
        np.testing.assert_allclose(tiny.logits(back.params, back.config, TOKENS), ours, atol=tolerance)
