"""How weights are laid out while sampling: by layer on a CPU, and once as long as they live."""

import gc

import jax
import numpy as np
import pytest

from espl_jax.models import lora
from espl_jax.sampling import layout
from espl_jax.sampling.layout import for_sampling
from espl_jax.sharding import make_mesh
from tests import tiny


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.fixture
def params():
    return lora.attach(tiny.params(), tiny.adapters())


def test_each_layer_has_its_slice_with_outputs_first(params):
    seen, config = for_sampling(params, tiny.CONFIG)
    assert (config.sampling_layout, config.phase, len(seen["layers"])) == ("unstacked", "sampling", 2)
    query, stacked = seen["layers"][1]["attention"]["query"], params["layers"]["attention"]["query"]
    np.testing.assert_array_equal(query["outputs_first"], stacked["weight"][1].transpose(1, 2, 0))
    np.testing.assert_array_equal(query["lora_b"], stacked["lora_b"][1])
    scale = params["layers"]["mlp_norm"]["scale"]
    np.testing.assert_array_equal(seen["layers"][0]["mlp_norm"]["scale"], scale[0])
    assert seen["embedding"] is params["embedding"]


def test_shapes_are_those_of_the_arrays(params):
    arrays, _ = for_sampling(params, tiny.CONFIG)
    shapes, _ = for_sampling(shapes_of(params), tiny.CONFIG)
    assert shapes_of(arrays) == shapes


def test_frozen_weights_are_laid_out_once_and_given_up_with_the_model(params):
    before = len(layout._unstacked)
    first, second = (for_sampling(params, tiny.CONFIG)[0]["layers"][0]["mlp"]["up"] for _ in range(2))
    assert first["outputs_first"] is second["outputs_first"]
    assert len(layout._unstacked) == before + 7  # four of attention, three of the MLP
    del params["layers"]
    gc.collect()
    assert len(layout._unstacked) == before


def test_several_devices_and_whoever_asks_for_it_keep_them_stacked(params):
    mesh = make_mesh({"fsdp": -1})
    for config, where in ((tiny.CONFIG, mesh), (tiny.CONFIG.replace(sampling_layout="stacked"), None)):
        seen, config = for_sampling(params, config, where)
        assert seen["layers"] is params["layers"] and config.sampling_layout == "stacked"


def test_what_is_laid_out_stays_so(params):
    once = for_sampling(params, tiny.CONFIG)
    assert for_sampling(*once)[0] is once[0]
