import pytest

from espl_jax.plan.hlo.text import parse


def only(shape):
    computations, entry = parse(f"ENTRY %main () -> f32[] {{\n  ROOT %x = {shape} parameter(0)\n}}\n")
    return computations[entry].instructions["x"]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("pred[3]", 3),
        ("token[]", 0),
        ("f8e4m3fn[10]", 10),
        ("s4[10]", 5),
        ("bf16[2,3]{1,0}", 12),
        ("f32[]{:T(128)}", 512),  # a scalar has a tile of its own
        ("f32[5,130]{1,0:T(8,128)}", 8 * 256 * 4),
        ("f32[5,130]{0,1:T(8,128)}", 136 * 128 * 4),  # the first axis is the minor one
        ("bf16[36,1,64]{2,1,0:T(8,128)(2,1)}", 36 * 8 * 128 * 2),
        ("bf16[36,4096,1,128]{3,1,2,0:T(8,128)(2,1)}", 36 * 4096 * 128 * 2),  # unpadded: rows are tiled
        ("bf16[7,128]{1,0:T(1,128)(2,1)}", 7 * 2 * 128 * 2),  # two rows in a word
        ("pred[64]{0:T(512)(128)(4,1)}", 512),
        ("bf16[<=7,2]{1,0}", 28),
    ],
)
def test_padded_bytes(shape, size):
    assert only(shape).bytes == size


def test_memory_spaces():
    x = only("(f32[2]{0:T(128)S(1)}, (f32[3]{0}, u32[]{:S(2)}), /*index=3*/f32[4]{0:S(0)})")
    assert [array.on_hbm for array in x.arrays] == [False, True, False, True]
    assert x.hbm_bytes == 12 + 16


def test_lines():
    computations, entry = (
        parse("""HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

FileNames
1 "model.py"

%f (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  ROOT %b.clone-1 = f32[2]{0} custom-call(%a, /*index=1*/%a), custom_call_target="k(", \
metadata={op_name="x[\\'y\\']/z)"}
}

ENTRY %main.3_spmd (p: f32[2]) -> f32[2] {
  %p = f32[2]{0:T(128)} parameter(0), metadata={op_name="p"}
  %c = f32[2]{0} constant({1, 2})
  ROOT %r = f32[2]{0:T(128)S(1)} fusion(%p), kind=kLoop, calls=%f
}
""")
    )
    assert entry == "main.3_spmd" and computations["f"].root == "b.clone-1"
    kernel = computations["f"].instructions["b.clone-1"]
    assert (kernel.opcode, kernel.operands, kernel.op_name) == ("custom-call", ("a", "a"), r"x[\'y\']/z)")
    main = computations[entry].instructions
    assert main["r"].called("calls") == "f" and main["c"].operands == ()
    assert computations["f"].parameters == {0: "a"}
