import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.sampling.buckets import bucket, pad_right


def test_the_ladder():
    rungs = sorted({bucket(size) for size in range(1000)})
    assert rungs == [64, 128, 192, 256, 384, 512, 768, 1024]
    assert [bucket(size, 16) for size in (0, 16, 17, 33, 49, 65)] == [16, 16, 32, 48, 64, 96]


@given(st.integers(0, 100_000), st.integers(1, 200))
def test_a_bucket_holds_its_size_and_wastes_at_most_half(size, smallest):
    rung = bucket(size, smallest)
    assert rung >= max(size, smallest)
    assert rung == smallest or rung <= 2 * size
    assert bucket(rung, smallest) == rung
    assert bucket(size + 1, smallest) >= rung


@given(st.lists(st.lists(st.integers(1, 50), max_size=70), min_size=1, max_size=5))
def test_pad_right(sequences):
    tokens, lengths = pad_right(sequences)
    assert tokens.dtype == lengths.dtype == np.int32
    assert tokens.shape == (len(sequences), bucket(max(map(len, sequences))))
    for row, length, sequence in zip(tokens, lengths, sequences, strict=True):
        assert row[:length].tolist() == list(sequence)
        assert not row[length:].any()


def test_a_width_of_ones_own():
    tokens, lengths = pad_right([[1, 2], []], width=3)
    assert tokens.tolist() == [[1, 2, 0], [0, 0, 0]]
    assert lengths.tolist() == [2, 0]
    with pytest.raises(ValueError, match="broadcast"):
        pad_right([[1, 2, 3, 4]], width=3)
