import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.rl.tree import sum_over_microbatches
from tests.support import ragged_tree


@pytest.mark.parametrize("size", [1, 5])
def test_narrow_sums_are_rounded_once(size):
    """150 rollouts by one and by five: what each microbatch gives in bfloat16 is summed in float32.

    Those without a token that counts are skipped.
    """
    batch = ragged_tree.random_tree(0, 61, (1, 2, 75)).train_batch()
    weights = np.random.default_rng(0).normal(size=64).astype(jnp.bfloat16)

    def function(micro):
        factor = 1 + jnp.abs(micro["advantages"]).sum()
        return {"narrow": factor.astype(jnp.bfloat16) * weights, "wide": factor}

    factors = 1 + np.abs(batch.advantages).reshape(-1, size).sum(axis=1)
    factors = factors[np.asarray(batch.mask).reshape(len(factors), -1).any(axis=1)]
    terms = (factors.astype(jnp.bfloat16)[:, None] * weights).astype(np.float64)
    total = sum_over_microbatches(function, batch, size)
    assert total["narrow"].dtype == jnp.bfloat16 and total["wide"].dtype == jnp.float32
    # Half a step of bfloat16; summed in it, the 150 terms are off by 1.5%.
    np.testing.assert_allclose(np.asarray(total["narrow"], np.float64), terms.sum(axis=0), rtol=2.0**-8)
    assert total["wide"] == pytest.approx(factors.sum(), rel=1e-5)
