import dataclasses
import json

import pytest

from espl_jax.models.config import Rope, config_from_dict
from tests import tiny


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"matmul_precision": "half"}, "matmul_precision='half' is unknown"),
        ({"dtype": "float16"}, "dtype='float16' is unknown"),
        ({"param_dtype": "int8"}, "param_dtype='int8' is unknown"),
        ({"activation": "relu"}, "activation='relu' is unknown"),
        ({"windows": (4,)}, "windows=\\(4,\\): give one for each of the 2 layers"),
        ({"windows": (4, -1)}, "0 where a layer sees everything"),
    ],
)
def test_impossible_records_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.CONFIG.replace(**change)


def test_it_is_a_static_argument():
    assert hash(tiny.CONFIG) == hash(tiny.CONFIG.replace())
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.CONFIG.num_layers = 3


@pytest.mark.parametrize("local", [None, Rope(theta=3.0, scaling="yarn", original_positions=8)])
def test_through_json_and_back(local):
    config = tiny.CONFIG.replace(windows=(3, 0), local_rope=local, rope=Rope(scaling="linear", factor=2.0))
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
