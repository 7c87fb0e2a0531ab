"""The layout of weights while sampling: unstacked on a CPU, and only once while the weights are alive."""

import gc

import jax
import numpy as np
import pytest

from espl_jax.models import lora
from espl_jax.parallel.sharding import make_mesh
from espl_jax.sampling import layout
from espl_jax.sampling.layout import for_sampling
from tests.support import tiny

AUTO, UNSTACKED = (tiny.CONFIG.replace(sampling_layout=layout) for layout in ("auto", "unstacked"))


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.fixture
def params():
    return lora.attach(tiny.params(), tiny.adapters())


def test_each_layer_has_its_slice_with_outputs_first(params):
    seen, config = for_sampling(params, AUTO)
    assert (config.sampling_layout, config.phase) == ("unstacked", "sampling")
    query, stacked = seen["layers"]["attention"]["query"], params["layers"]["attention"]["query"]
    for layer in range(2):
        expected = stacked["weight"][layer].transpose(1, 2, 0)
        np.testing.assert_array_equal(query["outputs_first"][layer], expected)
    assert query["lora_b"] is stacked["lora_b"] and "weight" not in query
    assert seen["layers"]["mlp_norm"] == params["layers"]["mlp_norm"]
    assert seen["embedding"] is params["embedding"]


def test_shapes_are_those_of_the_arrays(params):
    arrays, _ = for_sampling(params, UNSTACKED)
    shapes, _ = for_sampling(shapes_of(params), UNSTACKED)
    assert shapes_of(arrays) == shapes


def test_frozen_weights_are_laid_out_once_and_given_up_with_the_model(params):
    before = len(layout._unstacked)
    first, second = (for_sampling(params, UNSTACKED)[0]["layers"]["mlp"]["up"] for _ in range(2))
    assert first["outputs_first"][1] is second["outputs_first"][1]
    assert len(layout._unstacked) == before + 7  # four of attention, three of the MLP
    del params["layers"]
    gc.collect()
    assert len(layout._unstacked) == before


def test_several_devices_and_whoever_asks_for_it_keep_them_stacked(params):
    mesh = make_mesh({"fsdp": -1})
    for config, where in ((AUTO, mesh), (AUTO.replace(sampling_layout="stacked"), None)):
        seen, config = for_sampling(params, config, where)
        assert seen["layers"] is params["layers"] and config.sampling_layout == "stacked"


def test_what_is_laid_out_stays_so(params):
    once, config = for_sampling(params, UNSTACKED)
    again, _ = for_sampling(once, config)
    assert list(map(id, jax.tree.leaves(again))) == list(map(id, jax.tree.leaves(once)))
