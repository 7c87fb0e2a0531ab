import numpy as np
import pytest

from espl_jax.models import lora
from espl_jax.models.params import abstract
from espl_jax.pretrained import hf_names, layout
from tests.support import tiny

CONFIG = tiny.CONFIG.replace(qkv_bias=True, qk_norm=True, tied_head=False)
DECLARED = hf_names.by_path(abstract(CONFIG) | {"adapters": lora.abstract_adapters(CONFIG, 3)})


def test_products_are_torch_linear_layers():
    """A file's tensor times an input, as torch computes it, is ours under the einsum of the layer."""
    rng = np.random.default_rng(0)
    tensor, x = rng.normal(size=(24, 16)), rng.normal(size=16)
    query = layout.from_file(DECLARED["layers/attention/query/weight"], tensor)
    np.testing.assert_allclose(np.einsum("d,dnh->nh", x, query), (tensor @ x).reshape(4, 6))
    tensor, x = rng.normal(size=(16, 24)), rng.normal(size=(4, 6))
    out = layout.from_file(DECLARED["layers/attention/out/weight"], tensor)
    np.testing.assert_allclose(np.einsum("nh,nhd->d", x, out), tensor @ x.reshape(-1))


@pytest.mark.parametrize("path", DECLARED)
def test_there_and_back(path):
    weight = DECLARED[path]
    tensor = np.arange(np.prod(layout.file_shape(weight))).reshape(layout.file_shape(weight))
    ours = layout.from_file(weight, tensor)
    stacked = weight.axes[0] == "layers"
    assert ours.shape == weight.shape[stacked:]
    assert np.shares_memory(ours, tensor)
    np.testing.assert_array_equal(layout.to_file(weight, ours), tensor)
