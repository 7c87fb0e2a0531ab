"""Flops against lax's own meaning of a convolution: counted on paper, and by the definition."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.plan.hlo.traffic import traffic


def flops(result, left, right, opcode, attributes):
    return traffic(f"""ENTRY %main (a: f32[], b: f32[]) -> f32[] {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {result} {opcode}(%a, %b), {attributes}
}}
""").flops


@pytest.mark.parametrize(
    ("result", "left", "right", "opcode", "attributes", "expected"),
    [
        (
            *("f32[3,4,6]", "f32[3,4,5]", "f32[3,5,6]", "dot"),
            "lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}",
            2 * 3 * 4 * 5 * 6,
        ),
        ("f32[4,6]", "f32[4]", "f32[6]", "dot", "lhs_contracting_dims={}, rhs_contracting_dims={}", 2 * 24),
        ("f32[4,6]", "bf16[4,5]", "bf16[5,6]", "convolution", "dim_labels=bf_io->bf", 2 * 4 * 5 * 6),
        ("f32[4,6]", "bf16[4,5]", "bf16[6,5]", "convolution", "dim_labels=bf_oi->bf", 2 * 4 * 5 * 6),
        # A batched product, its batch of 64 as a dilated dimension: one of 64 positions meets an input.
        (
            *("f32[64,4,2048]", "bf16[64,4,128]", "bf16[64,2048,128]", "convolution"),
            "window={size=64 stride=63 lhs_dilate=64}, dim_labels=0bf_0oi->0bf",
            2 * 64 * 4 * 2048 * 128,
        ),
        # Two contracted dimensions: one of them slides over a window of its own size.
        (
            *("f32[64,4096,1]", "bf16[64,4,128]", "bf16[4,128,4096]", "convolution"),
            "window={size=4}, dim_labels=b0f_0io->bf0",
            2 * 64 * 4096 * 4 * 128,
        ),
        # An image, padded by one all round: the corners see 4 of 9, the edges 6, the middle 9.
        (
            *("f32[1,3,3,1]", "f32[1,3,3,2]", "f32[3,3,2,1]", "convolution"),
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 2 * (4 * 4 + 4 * 6 + 9),
        ),
    ],
)
def test_products(result, left, right, opcode, attributes, expected):
    assert flops(result, left, right, opcode, attributes) == expected


sizes = st.integers(1, 6)


@given(inputs=sizes, window=sizes, stride=sizes, low=st.integers(0, 3), dilate=sizes, rhs_dilate=sizes)
def test_one_dimension(inputs, window, stride, low, dilate, rhs_dilate):
    dilated = (inputs - 1) * dilate + 1
    outputs = (dilated + low + 3 - ((window - 1) * rhs_dilate + 1)) // stride + 1
    if outputs < 1:
        return
    real = [j % dilate == 0 for j in range(dilated)]
    padded = [False] * low + real + [False] * 3
    expected = sum(
        padded[o * stride + k * rhs_dilate] for o, k in itertools.product(range(outputs), range(window))
    )
    attributes = (
        f"window={{size={window} stride={stride} pad={low}_3 lhs_dilate={dilate} rhs_dilate={rhs_dilate}}}, "
        "dim_labels=b0f_0io->b0f"
    )
    assert (
        flops(f"f32[1,{outputs},1]", f"f32[1,{inputs},1]", f"f32[{window},1,1]", "convolution", attributes)
        == 2 * expected
    )


@pytest.mark.parametrize(("kernel", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_splash_attention_counts_what_causality_leaves(kernel, products):
    """Two rows of three heads; each of 4 queries sees 6 columns before the level and its own up to itself."""
    shapes = "s8[1,1,1]{2,1,0}, bf16[2,3,4,8]{3,2,1,0}, bf16[2,1,8,10]{3,2,1,0}, bf16[2,1,10,8]{3,2,1,0}"
    counted = traffic(f"""ENTRY %main (a: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  ROOT %splash_mha_{kernel}.1 = f32[] custom-call(%a), operand_layout_constraints={{{shapes}}}
}}
""").flops
    assert counted == 2 * products * 2 * 3 * 8 * (7 + 8 + 9 + 10)
