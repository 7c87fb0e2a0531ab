"""JSON values: exact round trips, and differences by field."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_jax.storage.json_values import differences, plain

numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers()
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), values))
def test_plain_values_read_back_exactly(value):
    text = json.dumps(plain(value, "value"))
    assert "\n" not in text and len(text.splitlines()) == 1
    assert repr(json.loads(text)) == repr(value)  # repr also tells 0.0 from -0.0 and 1 from 1.0 and True


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_float32_reads_back_exactly(value):
    array = np.array([value], np.float32)
    read = np.array(json.loads(json.dumps(plain(array, "value"))), np.float32)
    assert read.tobytes() == array.tobytes()


def test_arrays_and_scalars_become_plain():
    value = {
        "a": np.int64(3),
        "b": np.bool_(True),
        "c": jnp.bfloat16(1.5),
        "d": (np.arange(2), jnp.ones((1, 1))),
    }
    assert repr(plain(value, "v")) == repr({"a": 3, "b": True, "c": 1.5, "d": [[0, 1], [[1.0]]]})


@pytest.mark.parametrize(
    ("value", "error", "complaint"),
    [
        ({"loss": float("nan")}, ValueError, "v.loss is nan"),
        ({"a": [0, np.array([1.0, np.inf])]}, ValueError, r"v.a\[1\]\[1\] is inf"),
        ({"a": {3: 4}}, TypeError, "v.a has the key 3"),
        ({"a": {1, 2}}, TypeError, "v.a is a set"),
        ({"a": 1j}, TypeError, "v.a is a complex"),
    ],
)
def test_what_json_does_not_have_is_named(value, error, complaint):
    with pytest.raises(error, match=complaint):
        plain(value, "v")


def test_differences_are_named():
    old = {"seed": 0, "loss": {"kind": "pg", "clip": None}, "data": {}, "steps": 3}
    new = {"seed": 1, "loss": {"kind": "pg", "clip": 0.2, "kl": True}, "data": {}, "steps": 4}
    assert differences(old, new, may_change=["steps"]) == [
        "  loss.clip: null saved, 0.2 now",
        "  loss.kl: (absent) saved, true now",
        "  seed: 0 saved, 1 now",
    ]
    assert differences(old, new, may_change=["seed", "loss", "steps"]) == []
    assert differences({"lossy": 1}, {"lossy": 2}, may_change=["loss"]) == ["  lossy: 1 saved, 2 now"]
