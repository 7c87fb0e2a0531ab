"""Programs small enough to count on paper. Sizes without tiles are not padded."""

import pytest

from espl_jax.plan.hlo.traffic import breakdown, traffic

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def entry(body, others=""):
    return f"HloModule m, is_scheduled=true\n{others}\nENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n"


def moved(body, others="", **trips):
    counted = traffic(entry(body, others), **trips)
    return counted.read, counted.written


def test_elementwise():
    counted = traffic(
        entry("""
  %x = f32[4,8]{1,0} parameter(0)
  %y = bf16[4,8]{1,0} parameter(1)
  %z = f32[4,8]{1,0} convert(%y)
  ROOT %sum = f32[4,8]{1,0} add(%x, %z), metadata={op_name="jit(f)/add" stack_frame_id=2}""")
    )
    # convert reads 64 and writes 128; add reads twice 128 and writes 128.
    assert (counted.read, counted.written, counted.total, counted.flops) == (64 + 256, 256, 576, 0)
    largest = counted.by_operation[0]
    assert (largest.name, largest.op_name, largest.total) == ("sum", "jit(f)/add", 384)
    assert "66.7%" in breakdown(counted, 1) and "convert" not in breakdown(counted, 1)


def test_an_operand_given_twice_is_read_once():
    assert moved("""
  %x = f32[10]{0} parameter(0)
  ROOT %y = f32[10]{0} multiply(%x, %x)""") == (40, 40)


def test_memory_on_chip_costs_nothing():
    assert moved("""
  %x = f32[100]{0:T(128)} parameter(0)
  %start = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[100]{0:T(128)S(1)} copy-done(%start)
  %y = f32[100]{0:T(128)S(1)} negate(%near)
  %back = (f32[100]{0:T(128)}, f32[100]{0:T(128)S(1)}, u32[]{:S(2)}) copy-start(%y)
  ROOT %z = f32[100]{0:T(128)} copy-done(%back)""") == (512, 512)  # 100 padded to 128


def test_a_copy_within_hbm_counts_both_ways():
    assert moved("""
  %x = f32[100]{0} parameter(0)
  %start = (f32[100]{0}, f32[100]{0}, u32[]) copy-start(%x)
  ROOT %near = f32[100]{0} copy-done(%start)""") == (400, 400)


def test_names_for_the_same_memory_are_free():
    assert moved("""
  %x = f32[100]{0} parameter(0)
  %c = f32[] constant(1)
  %buffer = f32[9]{0} custom-call(), custom_call_target="AllocateBuffer"
  %b = f32[10,10]{1,0} bitcast(%x)
  %t = (f32[10,10]{1,0}, f32[]) tuple(%b, %c)
  ROOT %y = f32[10,10]{1,0} get-tuple-element(%t), index=0""") == (0, 0)


@pytest.mark.parametrize("opcode", ["slice", "dynamic-slice"])
def test_a_slice_reads_what_it_takes(opcode):
    operands, extra = ("%x", ", slice={[0:2]}") if opcode == "slice" else ("%x, %i", "")
    assert moved(f"""
  %x = f32[100,10]{{1,0}} parameter(0)
  %i = s32[]{{:S(6)}} constant(3)
  ROOT %y = f32[2,10]{{1,0}} {opcode}({operands}){extra}""") == (80, 80)


def test_operands_in_a_form_that_is_not_read_are_refused():
    with pytest.raises(ValueError, match="operands without %"):
        moved("""
  p0 = f32[100]{0} parameter(0)
  ROOT n = f32[100]{0} negate(p0)""")


def test_an_instruction_may_have_several_lines():
    """A kernel's metadata does, with a brace at the start of one."""
    assert moved("""
  %x = f32[100]{0} parameter(0)
  %k = f32[100]{0} custom-call(%x), custom_call_target="mine", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"odd\\": \\"}\\"}"
}}
  ROOT %z = f32[100]{0} negate(%k)""") == (800, 800)


def test_products_that_run_asynchronously_count():
    others = """
%product (x: f32[4,8], y: f32[8,2]) -> f32[4,2] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[8,2]{1,0} parameter(1)
  ROOT %d = f32[4,2]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    text = entry(
        """
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  %s = ((f32[4,8]{1,0}, f32[8,2]{1,0}), f32[4,2]{1,0}, u32[]) async-start(%a, %b), calls=%product
  ROOT %d = f32[4,2]{1,0} async-done(%s)""",
        others,
    )
    counted = traffic(text)
    assert (counted.flops, counted.read, counted.written) == (2 * 4 * 8 * 2, 128 + 64, 32)


def test_an_asynchronous_slice_reads_what_it_takes():
    assert moved("""
  %x = bf16[36,64]{1,0} parameter(0)
  %s = ((bf16[36,64]{1,0}), bf16[1,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[3:4], [0:64]}
  ROOT %y = bf16[1,64]{1,0:S(1)} slice-done(%s)""") == (128, 0)


def test_an_asynchronous_slice_as_dumps_write_it():
    others = """
%taken (x: bf16[36,64]) -> bf16[1,64] {
  %x = bf16[36,64]{1,0} parameter(0)
  ROOT %part = bf16[1,64]{1,0:S(1)} slice(%x), slice={[3:4], [0:64]}
}
"""
    body = """
  %x = bf16[36,64]{1,0} parameter(0)
  %s = ((bf16[36,64]{1,0}), bf16[1,64]{1,0:S(1)}, s32[]{:S(2)}) async-start(%x), calls=%taken
  ROOT %y = bf16[1,64]{1,0:S(1)} async-done(%s)"""
    assert moved(body, others) == (128, 0)


def test_a_gather_reads_its_rows():
    assert moved("""
  %table = f32[1000,10]{1,0} parameter(0)
  %rows = s32[3]{0} parameter(1)
  ROOT %y = f32[3,10]{1,0} gather(%table, %rows), offset_dims={1}""") == (120 + 12, 120)


def test_an_update_in_place_writes_the_update():
    assert moved("""
  %x = f32[100,10]{1,0} parameter(0)
  %new = f32[1,10]{1,0} parameter(1)
  %i = s32[]{:S(6)} constant(3)
  ROOT %y = f32[100,10]{1,0} dynamic-update-slice(%x, %new, %i, %i)""") == (40, 40)


FUSED_SLICE = """
%take (p.0: bf16[36,64,8], p.1: s32[]) -> bf16[64,8] {
  %p.0 = bf16[36,64,8]{2,1,0} parameter(0)
  %p.1 = s32[]{:S(6)} parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,8]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,64,8}
  ROOT %view = bf16[64,8]{1,0} bitcast(%slice)
}

%product (q.0: bf16[36,64,8], q.1: s32[], q.2: bf16[4,64]) -> f32[4,8] {
  %q.0 = bf16[36,64,8]{2,1,0} parameter(0)
  %q.1 = s32[]{:S(6)} parameter(1)
  %q.2 = bf16[4,64]{1,0:S(1)} parameter(2)
  %weight = bf16[64,8]{1,0} fusion(%q.0, %q.1), kind=kLoop, calls=%take
  ROOT %dot = f32[4,8]{1,0:S(1)} convolution(%q.2, %weight), dim_labels=bf_io->bf
}
"""


def test_a_slice_inside_of_a_nested_fusion():
    counted = traffic(
        entry(
            """
  %weights = bf16[36,64,8]{2,1,0} parameter(0)
  %i = s32[]{:S(6)} constant(3)
  %x = bf16[4,64]{1,0:S(1)} parameter(1)
  ROOT %y = f32[4,8]{1,0:S(1)} fusion(%weights, %i, %x), kind=kOutput, calls=%product""",
            FUSED_SLICE,
        )
    )
    assert (counted.read, counted.written, counted.flops) == (64 * 8 * 2, 0, 2 * 4 * 64 * 8)


def test_a_fusion_reads_the_whole_of_what_it_also_uses_whole():
    others = """
%f (p.0: f32[10,8]) -> f32[10,8] {
  %p.0 = f32[10,8]{1,0} parameter(0)
  %first = f32[1,8]{1,0} slice(%p.0), slice={[0:1], [0:8]}
  %row = f32[8]{0} bitcast(%first)
  %all = f32[10,8]{1,0} broadcast(%row), dimensions={1}
  ROOT %y = f32[10,8]{1,0} subtract(%p.0, %all)
}
"""
    body = """
  %x = f32[10,8]{1,0} parameter(0)
  ROOT %y = f32[10,8]{1,0} fusion(%x), kind=kLoop, calls=%f"""
    assert moved(body, others) == (320, 320)


def test_a_slice_behind_padding_and_conversion():
    others = """
%f (p.0: bf16[1,40,8], p.1: s32[]) -> f32[2,5,8] {
  %p.0 = bf16[1,40,8]{2,1,0} parameter(0)
  %p.1 = s32[]{:S(6)} parameter(1)
  %zero = bf16[] constant(0)
  %padded = bf16[2,40,8]{2,1,0} pad(%p.0, %zero), padding=0_1x0_0x0_0
  %wide = f32[2,40,8]{2,1,0} convert(%padded)
  ROOT %y = f32[2,5,8]{2,1,0} dynamic-slice(%wide, %p.1, %p.1, %p.1), dynamic_slice_sizes={2,5,8}
}
"""
    body = """
  %x = bf16[1,40,8]{2,1,0} parameter(0)
  %i = s32[]{:S(6)} constant(3)
  ROOT %y = f32[2,5,8]{2,1,0} fusion(%x, %i), kind=kLoop, calls=%f"""
    assert moved(body, others) == (5 * 8 * 2, 2 * 5 * 8 * 4)


UPDATE = """
%update (p.0: f32[100,10], p.1: f32[10], p.2: s32[]) -> (f32[100,10], f32[10]) {{
  %p.0 = f32[100,10]{{1,0}} parameter(0)
  %p.1 = f32[10]{{0}} parameter(1)
  %p.2 = s32[]{{:S(6)}} parameter(2)
  %zero = s32[] constant(0)
  %doubled = f32[10]{{0}} add(%p.1, %p.1)
  %row = f32[1,10]{{1,0}} bitcast(%doubled)
  %new = f32[100,10]{{1,0{space}}} dynamic-update-slice(%p.0, %row, %p.2, %zero)
  ROOT %out = (f32[100,10]{{1,0{space}}}, f32[10]{{0}}) tuple(%new, %doubled)
}}
"""


@pytest.mark.parametrize(
    ("before", "space", "read", "written"),
    [
        ("", "", 40, 40 + 40),  # the row that p.1 becomes, and the row itself
        ("", ":S(1)", 40 + 4000, 40),  # brought on chip: read whole
        (":S(1)", "", 40, 4000 + 40),  # brought back: written whole
    ],
)
def test_an_update_inside_of_a_fusion(before, space, read, written):
    body = f"""
  %x = f32[100,10]{{1,0{before}}} parameter(0)
  %v = f32[10]{{0}} parameter(1)
  %i = s32[]{{:S(6)}} constant(3)
  ROOT %y = (f32[100,10]{{1,0{space}}}, f32[10]{{0}}) fusion(%x, %v, %i), kind=kLoop, calls=%update"""
    assert moved(body, UPDATE.format(space=space)) == (read, written)


def test_a_custom_kernel_reads_and_writes_what_it_has_in_hbm():
    counted = traffic(
        entry(
            """
  %q = f32[8,16]{1,0:S(1)} parameter(0)
  %kv = f32[64,16]{1,0} parameter(1)
  ROOT %y = (f32[8,16]{1,0}, f32[8]{0:S(1)}) custom-call(%q, %kv), custom_call_target="tpu_custom_call", """
            + 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"777","bytes_accessed":"5"}}}'
        )
    )
    assert (counted.read, counted.written, counted.flops) == (4096, 512, 777)


def test_collectives_are_operations_like_others():
    assert moved(
        """
  %x = f32[16]{0} parameter(0)
  %r = f32[16]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  %start = (f32[16]{0}, f32[32]{0}) all-gather-start(%r), dimensions={0}
  ROOT %y = f32[32]{0} all-gather-done(%start)""",
        ADD,
    ) == (64 + 64, 64 + 128)


def test_a_reduction_does_not_count_its_function():
    assert moved(
        """
  %x = f32[16]{0} parameter(0)
  %zero = f32[]{:S(6)} constant(0)
  ROOT %r = f32[] reduce(%x, %zero), dimensions={0}, to_apply=%add""",
        ADD,
    ) == (64, 4)


@pytest.mark.parametrize(
    "names", ["branch_computations={%a, %b}", "true_computation=%a, false_computation=%b"]
)
def test_the_costlier_branch_counts(names):
    others = """
%a (a.0: f32[10]) -> f32[10] {
  ROOT %a.0 = f32[10]{0} parameter(0)
}

%b (b.0: f32[10]) -> f32[10] {
  %b.0 = f32[10]{0} parameter(0)
  ROOT %b.1 = f32[10]{0} negate(%b.0)
}
"""
    body = f"""
  %x = f32[10]{{0}} parameter(0)
  %i = s32[]{{:S(6)}} parameter(1)
  ROOT %y = f32[10]{{0}} conditional(%i, %x, %x), {names}"""
    assert moved(body, others) == (40, 40)


def test_a_call_costs_what_it_calls():
    others = """
%b (b.0: f32[10]) -> f32[10] {
  %b.0 = f32[10]{0} parameter(0)
  ROOT %b.1 = f32[10]{0} negate(%b.0)
}
"""
    assert moved(
        """
  %x = f32[10]{0} parameter(0)
  %y = f32[10]{0} call(%x), to_apply=%b
  ROOT %z = f32[10]{0} call(%y), to_apply=%b""",
        others,
    ) == (80, 80)


def test_a_slice_of_a_parameter_in_another_tiling():
    """As of int8 weights: the fusion inside lays out what is read, which is a slice."""
    others = """
%relaid (p: s8[4,32,128]) -> s8[4,32,128] {
  %p = s8[4,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = s8[4,32,128]{2,1,0:T(8,128)(4,1)} copy(%p)
}

%sliced (p: s8[4,32,128], i: s32[]) -> s8[1,32,128] {
  %p.1 = s8[4,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  %inner = s8[4,32,128]{2,1,0:T(8,128)(4,1)} fusion(%p.1), kind=kLoop, calls=%relaid
  %zero = s32[] constant(0)
  ROOT %cut = s8[1,32,128]{2,1,0:T(8,128)(4,1)} dynamic-slice(%inner, %i, %zero, %zero)
}
"""
    body = """
  %w = s8[4,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %layer = s8[1,32,128]{2,1,0:T(8,128)(4,1)} fusion(%w, %i.1), kind=kLoop, calls=%sliced"""
    assert moved(body, others) == (32 * 128 + 4, 32 * 128)


def test_an_update_of_a_parameter_in_another_tiling():
    """As of int8 keys: a part is read, changed and written back, in place."""
    others = """
%relaid (p: s8[4,32,256]) -> s8[4,32,256] {
  %p = s8[4,32,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = s8[4,32,256]{2,1,0:T(8,128)(4,1)} copy(%p)
}

%updated (p: s8[4,32,256], i: s32[], q: s8[1,32,128]) -> s8[4,32,256] {
  %p.1 = s8[4,32,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  %q = s8[1,32,128]{2,1,0:T(8,128)(4,1)} parameter(2)
  %inner = s8[4,32,256]{2,1,0:T(8,128)(4,1)} fusion(%p.1), kind=kLoop, calls=%relaid
  %zero = s32[] constant(0)
  %cut = s8[1,32,128]{2,1,0:T(8,128)(4,1)} dynamic-slice(%inner, %i, %zero, %zero)
  %sum = s8[1,32,128]{2,1,0:T(8,128)(4,1)} add(%cut, %q)
  ROOT %new = s8[4,32,256]{2,1,0:T(32,128)(4,1)} dynamic-update-slice(%inner, %sum, %i, %zero, %zero)
}
"""
    body = """
  %w = s8[4,32,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i.1 = s32[] parameter(1)
  %q.1 = s8[1,32,128]{2,1,0:T(8,128)(4,1)} parameter(2)
  ROOT %slots = s8[4,32,256]{2,1,0:T(32,128)(4,1)} fusion(%w, %i.1, %q.1), kind=kLoop, calls=%updated"""
    assert moved(body, others) == (2 * 32 * 128 + 4, 32 * 128)


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        traffic("module @jit_f {}")


@pytest.mark.parametrize(
    ("scope", "rows", "layers", "read", "flops"),
    [
        # Of two layers of four experts [8, 16]: those that two rows can have chosen, or all of one layer.
        ("experts_4_of_4", 2, 2, 2, 1),
        ("experts_4_of_4", 64, 2, 4, 1),
        # A quarter of all experts: a quarter of the products that there is room for.
        ("experts_4_of_16", 64, 1, 4, 4),
    ],
)
def test_experts_of_a_grouped_product(scope, rows, layers, read, flops):
    body = f"""
  %sizes = s32[{4 * layers}]{{0}} parameter(0)
  %x = f32[{rows},8]{{1,0}} parameter(1)
  %w = f32[{4 * layers},8,16]{{2,1,0}} parameter(2)
  ROOT %gmm.1 = f32[{rows},16]{{1,0}} custom-call(%sizes, %x, %w), custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(f)/{scope}/jit(gmm)/pallas_call"}}, \
backend_config={{"custom_call_config":{{"cost_estimate":{{"flops":"{2 * rows * 8 * 16}"}}}}}}"""
    counted = traffic(entry(body.replace("\\\n", "")))
    assert counted.read == 4 * (4 * layers + rows * 8 + read * 8 * 16)
    assert counted.flops == 2 * rows * 8 * 16 // flops
