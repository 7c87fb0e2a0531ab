import jax
import numpy as np
import optax
import pytest

from espl_jax.models import lora
from espl_jax.rl.losses import Loss
from espl_jax.training.optimizer import make_optimizer
from espl_jax.training.state import init_train_state, whole_params
from tests.support import ragged_tree, tiny, torch_llama
from tests.support.flat import compiled_gradients, gradients, policy_gradient_step

SHAPE = (2, 4, 2)
TEMPERATURE = 0.7

CONFIG = tiny.CONFIG.replace(lora_scale=0.5)


def full_gradients(params, batch, temperature=TEMPERATURE):
    """Computes gradients with the program that most tests share: all weights, microbatches of two groups."""
    return compiled_gradients(
        params, None, None, batch.train_batch(), CONFIG, temperature=temperature, microbatch_rows=4
    )


def lora_gradients(adapters, params, batch):
    """Likewise for adapters on the reference policy, with KL."""
    return compiled_gradients(
        adapters,
        params,
        params,
        batch.train_batch(),
        CONFIG,
        temperature=TEMPERATURE,
        kl_coef=0.3,
        microbatch_rows=4,
    )


@pytest.fixture(scope="module")
def params():
    return tiny.params()


@pytest.fixture(scope="module")
def batch(params):
    """Near policy, with NaN for the sampler's logprobs outside the mask."""
    batch = ragged_tree.random_tree(0, tiny.CONFIG.vocab_size, SHAPE)
    own = tiny.token_logprobs(params, tiny.CONFIG, ragged_tree.flatten(batch).tokens, TEMPERATURE)
    return ragged_tree.on_policy(batch, own, noise=0.2)


class TestAgainstTorch:
    """The tree in microbatches against autograd on the flattened batch."""

    @pytest.mark.slow
    def test_all_weights(self, params, batch):
        model = torch_llama.from_params(params, CONFIG)
        loss, expected = torch_llama.full_gradients(model, batch, temperature=TEMPERATURE)
        grads, metrics = full_gradients(params, batch)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
        self.assert_close(torch_llama.to_names(grads, CONFIG), expected)

    def test_all_weights_with_a_head_unrolled_and_with_kl(self, batch):
        config = CONFIG.replace(tied_head=False, scan_layers=False, remat="none")
        params, reference = tiny.params(config), tiny.params(config, seed=7)
        loss, expected = torch_llama.full_gradients(
            torch_llama.from_params(params, config),
            batch,
            temperature=TEMPERATURE,
            kl_coef=0.3,
            reference=torch_llama.from_params(reference, config),
        )
        grads, metrics = compiled_gradients(
            params,
            None,
            reference,
            batch.train_batch(),
            config,
            temperature=TEMPERATURE,
            kl_coef=0.3,
            microbatch_rows=4,
        )
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
        self.assert_close(torch_llama.to_names(grads, config), expected)

    def test_adapters_with_kl(self, params, batch):
        adapters = tiny.adapters(CONFIG)
        model = torch_llama.from_params(params, CONFIG)
        loss, expected = torch_llama.lora_gradients(
            model, adapters, 0.5, batch, temperature=TEMPERATURE, kl_coef=0.3, reference=model
        )
        grads, metrics = lora_gradients(adapters, params, batch)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
        tiny.assert_trees_close(grads, expected, 1e-4)

    def assert_close(self, ours, expected):
        assert set(ours) == set(expected)
        for name in expected:
            assert tiny.relative_error(ours[name], expected[name]) < 1e-4, name


class TestMicrobatches:
    @pytest.mark.parametrize("rows", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1))])
    def test_the_cut_does_not_matter(self, params, batch, rows):
        expected, totals = full_gradients(params, batch)
        config = CONFIG.replace(remat="none")
        grads, metrics = compiled_gradients(
            params, None, None, batch.train_batch(), config, temperature=TEMPERATURE, microbatch_rows=rows
        )
        tiny.assert_trees_close(grads, expected, 1e-5)
        for name, value in totals.items():
            assert metrics[name] == pytest.approx(float(value), rel=1e-5), name

    def test_a_size_that_does_not_divide_is_refused(self, params, batch):
        with pytest.raises(ValueError, match="microbatch_rows=3: does not divide the 16 rollouts of a shard"):
            gradients(params, None, None, batch.train_batch(), CONFIG, microbatch_rows=3)

    def test_more_rows_than_there_are_means_all(self, params, batch):
        shapes = jax.eval_shape(
            lambda p: gradients(p, None, None, batch.train_batch(), CONFIG, microbatch_rows=32)[0], params
        )
        assert jax.tree.structure(shapes) == jax.tree.structure(params)


class TestMeaning:
    def test_metrics_are_means_over_the_tokens_drawn(self, params, batch):
        _, metrics = full_gradients(params, batch)
        own = tiny.token_logprobs(params, CONFIG, ragged_tree.flatten(batch).tokens, TEMPERATURE)
        log_ratio = ragged_tree.pick(own, batch).reshape(batch.mask.shape) - batch.sampler_logprobs
        log_ratio = log_ratio[batch.mask]
        assert metrics["log_ratio_abs"] == pytest.approx(np.abs(log_ratio).mean(), rel=1e-4)
        assert metrics["ratio"] == pytest.approx(np.exp(log_ratio).mean(), rel=1e-4)
        advantages = np.broadcast_to(batch.advantages[..., None], batch.mask.shape)[batch.mask]
        expected = -(np.exp(log_ratio) * advantages).sum() / batch.num_rollouts
        assert metrics["loss"] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("temperature", [0.7, 1.0])
    def test_logprobs_of_the_tree_are_those_of_plain_sequences(self, params, batch, temperature):
        own = tiny.token_logprobs(params, CONFIG, ragged_tree.flatten(batch).tokens, temperature)
        _, metrics = full_gradients(params, ragged_tree.on_policy(batch, own), temperature)
        assert metrics["log_ratio_abs"] < 2e-6
        assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)

    def test_what_lies_outside_the_mask_does_not_matter(self, params, batch):
        expected, _ = full_gradients(params, batch)
        hidden = ~batch.mask
        dirty = batch._replace(
            targets=np.where(hidden, 5, batch.targets),
            sampler_logprobs=np.where(hidden, np.inf, batch.sampler_logprobs),
            # The last rollout has no token under the mask.
            advantages=np.where(batch.mask.any(-1), batch.advantages, np.nan).astype(np.float32),
        )
        assert np.isnan(dirty.advantages).sum() == 1
        grads, _ = full_gradients(params, dirty)
        tiny.assert_trees_close(grads, expected, 1e-6)

    def test_groups_without_a_gradient_can_be_left_out(self, params, batch):
        """Zero advantages and empty masks both give no gradient."""
        gone = np.arange(4)[None, :, None] >= 2
        still, _ = full_gradients(params, batch._replace(advantages=np.where(gone, 0, batch.advantages)))
        empty, _ = full_gradients(params, batch._replace(mask=batch.mask & ~gone[..., None]))
        tiny.assert_trees_close(still, empty, 1e-5)

    def test_the_divisor_is_the_number_of_rollouts(self, params, batch):
        once, _ = full_gradients(params, batch)
        half, _ = full_gradients(params, batch._replace(num_rollouts=2 * batch.num_rollouts))
        tiny.assert_trees_close(jax.tree.map(lambda g: 2 * g, half), once, 1e-6)

    def test_kl_to_itself_has_neither_value_nor_gradient(self, params, batch):
        still = batch._replace(advantages=np.zeros_like(batch.advantages))
        fresh = lora.init(jax.random.key(0), CONFIG, 3)
        grads, metrics = lora_gradients(fresh, params, still)
        assert abs(metrics["kl"]) < 1e-6
        assert optax.global_norm(grads) < 1e-5

    @pytest.mark.slow
    def test_bfloat16_products_come_close(self, params, batch):
        expected, _ = full_gradients(params, batch)
        config = CONFIG.replace(matmul_precision="bfloat16")
        grads, _ = compiled_gradients(
            params, None, None, batch.train_batch(), config, temperature=TEMPERATURE, microbatch_rows=4
        )
        tiny.assert_trees_close(grads, expected, 0.1)


@pytest.fixture(scope="module")
def of_kinds(params, batch):
    """Metrics of three losses in a batch's only update, under the KL estimator k2."""

    @jax.jit
    def metrics(batch):
        settings = {"temperature": TEMPERATURE, "kl_coef": 0.3, "kl_estimator": "k2"}
        reference = tiny.params(seed=7)
        config = CONFIG.replace(remat="none")
        kinds = {"plain": Loss(), "capped": Loss(sampler_weight_cap=1.1), "gspo": Loss("gspo")}
        return {
            name: gradients(params, None, reference, batch, config, loss=loss, **settings)[1]
            for name, loss in kinds.items()
        }

    return metrics(batch.train_batch())


class TestOffPolicy:
    """The sampler's logprobs are off by 0.2 nats a token; the trainer's own are those before the update."""

    def log_ratios(self, params, batch):
        own = tiny.token_logprobs(params, CONFIG, ragged_tree.flatten(batch).tokens, TEMPERATURE)
        own = ragged_tree.pick(own, batch).reshape(batch.mask.shape)
        return own[batch.mask] - batch.sampler_logprobs[batch.mask]

    def test_the_ratio_of_gspo_is_not_to_the_sampler(self, of_kinds):
        metrics = of_kinds["gspo"]
        assert metrics["ratio"] == pytest.approx(1, abs=1e-6) and metrics["clip_fraction"] == 0
        assert metrics["log_ratio_abs"] > 0.1

    def test_but_that_of_importance_sampling(self, of_kinds, params, batch):
        expected = np.exp(self.log_ratios(params, batch)).mean()
        assert of_kinds["plain"]["ratio"] == pytest.approx(expected, rel=1e-4)

    def test_the_cap_weighs_what_the_ratio_leaves_out(self, of_kinds, params, batch):
        expected = np.minimum(np.exp(self.log_ratios(params, batch)), 1.1).mean()
        assert of_kinds["capped"]["ratio"] == pytest.approx(1, abs=1e-6)
        assert of_kinds["capped"]["sampler_weight"] == pytest.approx(expected, rel=1e-4)

    def test_estimates_of_the_kl_are_weighted(self, of_kinds, params, batch):
        flat = ragged_tree.flatten(batch).tokens
        pairs = (tiny.token_logprobs(p, CONFIG, flat, TEMPERATURE) for p in (params, tiny.params(seed=7)))
        ours, theirs = (ragged_tree.pick(x, batch).reshape(batch.mask.shape)[batch.mask] for x in pairs)
        expected = (np.exp(self.log_ratios(params, batch)) * (ours - theirs) ** 2 / 2).mean()
        assert expected > 0.01
        for metrics in of_kinds.values():
            assert metrics["kl"] == pytest.approx(expected, rel=1e-3)


class TestTruncation:
    def test_cutoffs_that_cut_nothing_change_nothing(self, params, batch):
        expected, totals = full_gradients(params, batch)
        everything = np.full(batch.mask.shape, -np.inf, np.float32)
        grads, metrics = full_gradients(params, batch._replace(cutoffs=everything))
        tiny.assert_trees_close(grads, expected, 1e-5)
        assert set(metrics) - set(totals) == {"cut_disagreements"} and metrics["cut_disagreements"] == 0
        for name, value in totals.items():
            assert metrics[name] == pytest.approx(float(value), rel=1e-5), name

    def test_the_kept_set_is_drawn_again(self, params, batch):
        """Sampler logprobs truncated in numpy: on policy, the ratio is one."""
        flat = ragged_tree.flatten(batch).tokens
        logprobs = jax.nn.log_softmax(tiny.logits(params, CONFIG, flat) / TEMPERATURE)
        rows = ragged_tree.pick(logprobs, batch).reshape(*batch.mask.shape, -1).astype(np.float64)
        ordered = -np.sort(-rows, axis=-1)
        cutoffs = ordered[..., 19:21].mean(axis=-1)  # twenty of 61 are kept
        own = np.take_along_axis(rows, batch.targets[..., None], axis=-1)[..., 0]
        kept = (rows >= cutoffs[..., None]) | (rows == own[..., None])
        sampler = own - np.log((np.exp(rows) * kept).sum(axis=-1))
        truncated = batch._replace(
            sampler_logprobs=sampler.astype(np.float32), cutoffs=cutoffs.astype(np.float32)
        )
        _, metrics = full_gradients(params, truncated)
        assert metrics["log_ratio_abs"] < 1e-5
        assert metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
        # The targets are random, so the sampler would have cut many of them.
        expected = (own < cutoffs)[batch.mask].mean()
        assert expected > 0.3 and metrics["cut_disagreements"] == pytest.approx(expected, abs=1e-6)
        _, whole = full_gradients(params, truncated._replace(cutoffs=None))
        assert whole["log_ratio_abs"] > 0.05


class TestStep:
    def test_adapters_learn_and_their_base_does_not(self, params, batch):
        before = jax.tree.map(np.array, params)
        optimizer = make_optimizer(1e-2, max_grad_norm=0.0)
        state = init_train_state(lora.init(jax.random.key(0), CONFIG, 2), optimizer)
        old, start = state.trainable, jax.tree.map(np.array, state.trainable)
        losses, gradient_norms = [], []
        for step in range(1, 4):
            state, metrics = policy_gradient_step(state, params, None, batch.train_batch(), CONFIG, optimizer)
            assert int(state.step) == step
            losses.append(float(metrics["loss"]))
            gradient_norms.append(float(metrics["grad_norm"]))
            if step == 1:
                moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), state.trainable, start)
                momentum = optax.tree.get(state.opt_state, "mu")
                # Adam's mean after one step is a tenth of the gradient.
                first_norm = 10 * float(optax.global_norm(momentum))
        assert losses == sorted(losses, reverse=True)
        assert gradient_norms[0] == pytest.approx(first_norm, rel=1e-5)
        for path, distance in jax.tree_util.tree_leaves_with_path(moved):
            # B is zero at first, so A has no gradient yet; Adam's first step is the learning rate itself.
            assert distance == pytest.approx(0.0 if path[-1].key == "lora_a" else 1e-2, rel=1e-3)
        jax.tree.map(np.testing.assert_array_equal, params, before)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))  # donated

    def test_whole_params(self, params):
        adapters = tiny.adapters()
        assert whole_params(params, None) is params
        joined = whole_params(adapters, params)
        assert joined["layers"]["mlp"]["up"]["weight"] is params["layers"]["mlp"]["up"]["weight"]
        assert joined["layers"]["mlp"]["up"]["lora_a"] is adapters["layers"]["mlp"]["up"]["lora_a"]
