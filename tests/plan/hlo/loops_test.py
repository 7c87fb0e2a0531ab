import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.plan.hlo.traffic import traffic

LOOP = """HloModule m

%body (p: (s32[], f32[8,8], f32[4,8], s32[])) -> (s32[], f32[8,8], f32[4,8], s32[]) {{
  %p = (s32[]{{:S(6)}}, f32[8,8]{{1,0}}, f32[4,8]{{1,0:S(1)}}, s32[]{{:S(6)}}) parameter(0)
  %i = s32[]{{:S(6)}} get-tuple-element(%p), index=0
  %step = s32[]{{:S(6)}} constant({step})
  %copied = s32[]{{:S(6)}} copy(%i)
  %next = s32[]{{:S(6)}} add(%copied, %step)
  %w = f32[8,8]{{1,0}} get-tuple-element(%p), index=1
  %x = f32[4,8]{{1,0:S(1)}} get-tuple-element(%p), index=2
  %y = f32[4,8]{{1,0:S(1)}} dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %n = s32[]{{:S(6)}} get-tuple-element(%p), index=3
  ROOT %out = (s32[]{{:S(6)}}, f32[8,8]{{1,0}}, f32[4,8]{{1,0:S(1)}}, s32[]{{:S(6)}}) tuple(%next, %w, %y, %n)
}}

%less (l: s32[], r: s32[]) -> pred[] {{
  %l = s32[]{{:S(6)}} parameter(0)
  %r = s32[]{{:S(6)}} parameter(1)
  ROOT %c = pred[]{{:S(6)}} compare(%l, %r), direction={direction}
}}

%cond (q: (s32[], f32[8,8], f32[4,8], s32[])) -> pred[] {{
  %q = (s32[]{{:S(6)}}, f32[8,8]{{1,0}}, f32[4,8]{{1,0:S(1)}}, s32[]{{:S(6)}}) parameter(0)
  %j = s32[]{{:S(6)}} get-tuple-element(%q), index=0
  %m = s32[]{{:S(6)}} get-tuple-element(%q), index=3
  ROOT %go = pred[]{{:S(6)}} fusion(%j, %m), kind=kLoop, calls=%less
}}

ENTRY %main (w: f32[8,8], x: f32[4,8]) -> f32[4,8] {{
  %w.1 = f32[8,8]{{1,0}} parameter(0)
  %x.1 = f32[4,8]{{1,0:S(1)}} parameter(1)
  %first = s32[]{{:S(6)}} constant({first})
  %limit = s32[]{{:S(6)}} {limit}
  %t = (s32[]{{:S(6)}}, f32[8,8]{{1,0}}, f32[4,8]{{1,0:S(1)}}, s32[]{{:S(6)}}) \
tuple(%first, %w.1, %x.1, %limit)
  %loop = (s32[]{{:S(6)}}, f32[8,8]{{1,0}}, f32[4,8]{{1,0:S(1)}}, s32[]{{:S(6)}}) while(%t), \
condition=%cond, body=%body, metadata={{op_name="jit(decode_chunk)/while" stack_frame_id=7}}{note}
  ROOT %z = f32[4,8]{{1,0:S(1)}} get-tuple-element(%loop), index=2
}}
"""


def program(first=0, step=1, direction="LT", limit="constant(36)", note=""):
    return LOOP.format(first=first, step=step, direction=direction, limit=limit, note=note)


def test_a_loop_multiplies_its_body():
    counted = traffic(program())
    # The weight is read in every trip; the rest is on chip.
    assert (counted.read, counted.written, counted.flops) == (36 * 256, 0, 36 * 2 * 4 * 8 * 8)
    assert counted.by_operation[0].executions == 36


@given(
    first=st.integers(-50, 50),
    limit=st.integers(-50, 50),
    step=st.integers(-7, 7).filter(bool),
    direction=st.sampled_from(["LT", "LE", "GT", "GE"]),
)
def test_trips_of_any_counter(first, limit, step, direction):
    runs = {
        "LT": lambda i: i < limit,
        "LE": lambda i: i <= limit,
        "GT": lambda i: i > limit,
        "GE": lambda i: i >= limit,
    }[direction]
    text = program(first, step, direction, f"constant({limit})")
    if (step > 0) != (direction in ("LT", "LE")):
        with pytest.raises(ValueError, match="no trip count"):  # none, or without end
            traffic(text)
        return
    i, trips = first, 0
    while runs(i):
        i, trips = i + step, trips + 1
    assert traffic(text).flops == trips * 512


@pytest.mark.parametrize(("first", "step"), [(0, 4), (72, -4)])
def test_counting_until_equal(first, step):
    assert traffic(program(first, step, "NE")).flops == 9 * 512


@pytest.mark.parametrize(("first", "step", "direction"), [(0, 5, "NE"), (72, 4, "NE"), (36, 1, "EQ")])
def test_counters_that_miss_or_merely_meet(first, step, direction):
    with pytest.raises(ValueError, match="no trip count"):
        traffic(program(first, step, direction))


def test_the_compiler_s_note_comes_first():
    note = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert traffic(program(limit="parameter(2)", note=note)).flops == 5 * 512


@pytest.mark.parametrize("name", ["jit(decode_chunk)/while", "decode_chunk)/while", "loop"])
def test_an_unknown_count_is_given_by_origin_or_name(name):
    assert traffic(program(limit="parameter(2)"), {name: 32}).flops == 32 * 512
    assert traffic(program(), {name: 32}).flops == 36 * 512, "what the program says holds"


def test_an_unknown_count_that_nobody_gives():
    with pytest.raises(ValueError, match=r"loop loop \(op_name 'jit\(decode_chunk\)/while'\).*unknown_trips"):
        traffic(program(limit="parameter(2)"), {"jit(prefill)/while": 3})


def test_loops_in_loops():
    text = program().replace("ENTRY %main", "%inner")
    text += """
%outer_body (p.9: (s32[], f32[8,8], f32[4,8])) -> (s32[], f32[8,8], f32[4,8]) {
  %p.9 = (s32[]{:S(6)}, f32[8,8]{1,0}, f32[4,8]{1,0:S(1)}) parameter(0)
  %i.9 = s32[]{:S(6)} get-tuple-element(%p.9), index=0
  %one.9 = s32[]{:S(6)} constant(1)
  %next.9 = s32[]{:S(6)} add(%i.9, %one.9)
  %w.9 = f32[8,8]{1,0} get-tuple-element(%p.9), index=1
  %x.9 = f32[4,8]{1,0:S(1)} get-tuple-element(%p.9), index=2
  %y.9 = f32[4,8]{1,0:S(1)} call(%w.9, %x.9), to_apply=%inner
  ROOT %t.9 = (s32[]{:S(6)}, f32[8,8]{1,0}, f32[4,8]{1,0:S(1)}) tuple(%next.9, %w.9, %y.9)
}

%outer_cond (q.9: (s32[], f32[8,8], f32[4,8])) -> pred[] {
  %q.9 = (s32[]{:S(6)}, f32[8,8]{1,0}, f32[4,8]{1,0:S(1)}) parameter(0)
  %j.9 = s32[]{:S(6)} get-tuple-element(%q.9), index=0
  %ten.9 = s32[]{:S(6)} constant(10)
  ROOT %go.9 = pred[]{:S(6)} compare(%j.9, %ten.9), direction=LT
}

ENTRY %main (w: f32[8,8], x: f32[4,8]) -> f32[4,8] {
  %w.8 = f32[8,8]{1,0} parameter(0)
  %x.8 = f32[4,8]{1,0:S(1)} parameter(1)
  %zero.8 = s32[]{:S(6)} constant(0)
  %t.8 = (s32[]{:S(6)}, f32[8,8]{1,0}, f32[4,8]{1,0:S(1)}) tuple(%zero.8, %w.8, %x.8)
  %l.8 = (s32[]{:S(6)}, f32[8,8]{1,0}, f32[4,8]{1,0:S(1)}) while(%t.8), \
condition=%outer_cond, body=%outer_body
  ROOT %z.8 = f32[4,8]{1,0:S(1)} get-tuple-element(%l.8), index=2
}
"""
    counted = traffic(text)
    assert (counted.read, counted.written, counted.flops) == (360 * 256, 0, 360 * 512)
