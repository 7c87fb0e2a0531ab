"""MXFP4 by hand and against transformers' reader."""

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from espl_jax.pretrained.mxfp4 import Mxfp4

ALL = slice(None)


def test_by_hand():
    """Low bits first: 0x92 is 1 and -0.5. A scale of 128 doubles, one of 126 halves."""
    blocks = np.zeros((1, 2, 16), np.uint8)
    blocks[0, :, 0], blocks[0, :, 15] = 0x92, 0x7F
    values = Mxfp4(blocks, np.array([[128, 126]], np.uint8))[ALL, ALL]
    assert values.dtype == np.float32 and values.shape == (1, 64)
    assert values[0, [0, 1, 30, 31]].tolist() == [2.0, -1.0, -12.0, 12.0]
    assert values[0, [32, 33, 62, 63]].tolist() == [0.5, -0.25, -3.0, 3.0]
    assert not values[0, 2:30].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_under_every_scale_as_transformers(dtype):
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 1)).reshape(1, 256, 16, 16)
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, 1)[None]
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=dtype)
    ours = torch.tensor(Mxfp4(blocks[0], scales[0])[ALL, ALL].T.copy()).to(dtype)
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(ours.view(as_bits), theirs[0].contiguous().view(as_bits))


@pytest.mark.parametrize("columns", [slice(0, 96), slice(5, 40), slice(32, 64), slice(31, 33), slice(70, 96)])
@pytest.mark.parametrize("rows", [slice(0, 7), slice(2, 5), slice(1, None, 2)])
def test_a_part_is_that_of_the_whole(rows, columns):
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (7, 3, 16), np.uint8), rng.integers(100, 150, (7, 3), np.uint8)
    matrix = Mxfp4(blocks, scales)
    np.testing.assert_array_equal(matrix[rows, columns], matrix[ALL, ALL][rows, columns])
