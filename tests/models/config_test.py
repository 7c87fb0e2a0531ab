import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from espl_jax.models.config import Rope, config_from_dict
from tests.support import tiny


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4: is not a multiple of num_kv_heads=3"),
        ({"matmul_precision": "half"}, "matmul_precision='half' is unknown"),
        ({"dtype": "float16"}, "dtype='float16' is unknown"),
        ({"param_dtype": "int4"}, "param_dtype='int4' is unknown"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"dtype": jnp.float16}, "dtype='float16' is unknown"),
        ({"param_dtype": np.int16}, "param_dtype='int16' is unknown"),
        ({"dtype": "float"}, "dtype='float' is unknown"),
        ({"dtype": None}, "dtype=None is unknown"),
        ({"dtype": torch.float32}, "dtype=torch.float32 is unknown; choose one of"),
        ({"activation": "relu"}, "activation='relu' is unknown"),
        ({"windows": (4,)}, "windows=\\(4,\\): give one number for each of the 2 layers"),
        ({"windows": (4, -1)}, r"\(0 for a layer without a window\)"),
    ],
)
def test_impossible_records_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.CONFIG.replace(**change)


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.dtype("bfloat16"), jnp.zeros(1, "bfloat16").dtype, np.float32, np.dtype("f4")]
)
def test_dtypes_of_jax_and_numpy_are_their_names(dtype):
    name = "float32" if dtype in (np.float32, np.dtype("f4")) else "bfloat16"
    config = tiny.CONFIG.replace(dtype=dtype, param_dtype=dtype)
    assert config == tiny.CONFIG.replace(dtype=name, param_dtype=name)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["dtype"] == name


def test_it_is_a_static_argument():
    assert hash(tiny.CONFIG) == hash(tiny.CONFIG.replace())
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.CONFIG.num_layers = 3


@pytest.mark.parametrize("local", [None, Rope(theta=3.0, scaling="yarn", original_positions=8)])
def test_through_json_and_back(local):
    config = tiny.CONFIG.replace(windows=(3, 0), local_rope=local, rope=Rope(scaling="linear", factor=2.0))
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
