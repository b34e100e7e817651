"""Compiled text is read as it is meant: every number below is counted by hand."""

import doctest
import importlib

import pytest

from rkd_jax.aot.collectives import Traffic, collective_traffic, group_size
from rkd_jax.aot.hlo import Array, Instruction, parse
from rkd_jax.aot.traffic import hbm_bytes

# A step as the TPU compiler writes one: a scan of 3 layers whose weights are gathered
# from 4 devices, gradients that are reduced and scattered in one fusion, a reduced
# loss, and weights that are fetched to the chip ahead of their use.
STEP = """
HloModule jit_step, is_scheduled=true, num_partitions=8

%sum (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[]{:T(128)} parameter(0)
  %b.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a.1, %b.1)
}

%read_layer (p.0: bf16[3,256,128], p.1: s32[]) -> bf16[256,128] {
  %p.0 = bf16[3,256,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %cut = bf16[1,256,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,256,128}
  ROOT %flat = bf16[256,128]{1,0:T(8,128)(2,1)} bitcast(%cut)
}

%all-reduce-scatter.7 (q.0: f32[64,128]) -> f32[8,128] {
  %q.0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %reduced = f32[64,128]{1,0:T(8,128)} all-reduce(%q.0), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%sum
  %here = s32[]{:T(128)} constant(8)
  %none = s32[]{:T(128)} constant(0)
  ROOT %mine = f32[8,128]{1,0:T(8,128)} dynamic-slice(%reduced, %here, %none), dynamic_slice_sizes={8,128}
}

%layer (carry: (s32[], bf16[16,128], bf16[3,256,128])) -> (s32[], bf16[16,128], bf16[3,256,128]) {
  %carry = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[3,256,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[16,128]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %stack = bf16[3,256,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %mine.1 = bf16[256,128]{1,0:T(8,128)(2,1)} fusion(%stack, %i), kind=kLoop, calls=%read_layer
  %gather = (bf16[256,128]{1,0:T(8,128)(2,1)}, bf16[1024,128]{1,0:T(8,128)(2,1)}) all-gather-start(%mine.1), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, use_global_device_ids=true
  %whole = bf16[1024,128]{1,0:T(8,128)(2,1)} all-gather-done(%gather)
  %product = bf16[16,1024]{1,0:T(8,128)(2,1)S(1)} convolution(%x, %whole), dim_labels=bf_oi->bf
  %y = bf16[16,128]{1,0:T(8,128)(2,1)} convolution(%product, %whole), dim_labels=bf_io->bf
  ROOT %next = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)}, bf16[3,256,128]{2,1,0:T(8,128)(2,1)}) tuple(%i, %y, %stack)
}

%more (carry.1: (s32[], bf16[16,128], bf16[3,256,128])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)}, bf16[3,256,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %three = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %three), direction=LT
}

ENTRY %main (x.0: bf16[16,128], w.0: bf16[3,256,128], g.0: f32[64,128]) -> (f32[8,128], f32[]) {
  %x.0 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w.0 = bf16[3,256,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %g.0 = f32[64,128]{1,0:T(8,128)} parameter(2)
  %start = s32[]{:T(128)} constant(0)
  %first = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)}, bf16[3,256,128]{2,1,0:T(8,128)(2,1)}) tuple(%start, %x.0, %w.0)
  %loop = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)}, bf16[3,256,128]{2,1,0:T(8,128)(2,1)}) while(%first), condition=%more, body=%layer, metadata={op_name="jit(step)/while(x)"}
  %scattered = f32[8,128]{1,0:T(8,128)} fusion(%g.0), kind=kCustom, calls=%all-reduce-scatter.7
  %loss = f32[]{:T(128)} constant(1)
  %total = f32[]{:T(128)} all-reduce(%loss), channel_id=4, replica_groups={}, to_apply=%sum
  %alone = f32[8,128]{1,0:T(8,128)} all-reduce(%scattered), channel_id=5, replica_groups=[8,1]<=[8], to_apply=%sum
  %passed = f32[8,128]{1,0:T(8,128)} collective-permute(%alone), channel_id=6, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (f32[8,128]{1,0:T(8,128)}, f32[]{:T(128)}) tuple(%passed, %total)
}
"""  # noqa: E501 - lines as the compiler writes them


def test_a_loop_counts_as_often_as_it_turns():
    program = parse(STEP)
    assert program.entry == "main"
    assert program.weights["layer"] == 3
    assert program.weights["read_layer"] == 3
    assert "sum" not in program.weights  # applied to elements, not run
    assert program.fused == {"read_layer", "all-reduce-scatter.7"}
    assert program.guessed == ()


def test_a_trip_count_that_is_told_goes_before_the_condition():
    told = ', backend_config={"known_trip_count":{"n":"5"},"x":{}}'
    text = STEP.replace('metadata={op_name="jit(step)/while(x)"}', told[2:])
    assert parse(text).weights["layer"] == 5


def test_bytes_of_collectives():
    shard, whole = 256 * 128 * 2, 64 * 128 * 4
    assert collective_traffic(parse(STEP), 8) == {
        "all-gather": Traffic(3, 3 * 3 * shard),  # 3 layers, to 3 others each
        "reduce-scatter": Traffic(1, whole * 7 / 8),
        "all-reduce": Traffic(1, 2 * 4 * 7 / 8),  # a float32; a group of one is free
        "collective-permute": Traffic(1, 8 * 128 * 4),
    }


def test_a_gather_spread_over_fusions_counts_once():
    """As the compiler overlaps one with products: parts share the channel."""
    part = "%all-reduce-scatter.7 (q.0"
    chain = """%start (s: f32[1,256]) -> f32[1,2048] {
  %s = f32[1,256]{1,0} parameter(0)
  ROOT %g = f32[1,2048]{1,0} all-gather(%s), channel_id=9, replica_groups=mesh['x'=8] {'x'}, dimensions={1}
}

"""  # noqa: E501 - one instruction is one line
    step = "  %here.2 = f32[1,2048]{1,0} fusion(%zero.2), kind=kCustom, calls=%start\n"
    step = "  %zero.2 = f32[1,256]{1,0} constant({...})\n" + step
    end = step.replace("%start", "%start.2").replace(".2 = ", ".3 = ")
    text = STEP.replace(part, chain + chain.replace("%start ", "%start.2 ") + part)
    text = text.replace("  %i = s32", step + "  %i = s32")  # in the loop
    text = text.replace("  %start = s32", end + "  %start = s32")  # and outside
    before = collective_traffic(parse(STEP), 8)["all-gather"]
    after = collective_traffic(parse(text), 8)["all-gather"]
    assert after == Traffic(before.count + 1, before.bytes + 7 * 256 * 4)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("{}", 8),
        ("mesh['a'=4,'b'=2] {'b'}", 2),
        ("mesh['a'=4,'b'=2] {'a', 'b'}", 8),
        ("mesh['a'=16] {'a':(2)4}", 4),
    ],
)
def test_groups_as_the_compilers_write_them(groups, size):
    attributes = f", channel_id=1, replica_groups={groups}, dimensions={{0}}"
    gather = Instruction("g", (), "all-gather", (), "", attributes, False)
    assert group_size(gather, 8) == size


def test_a_loop_may_take_larger_steps():
    text = WALK.replace(
        "%m = s32[] get-tuple-element(%d), index=2", "%m = s32[] constant(8)"
    )
    assert parse(text).weights["body"] == 8
    more = "%two = s32[] constant(2)\n  %k = s32[] add(%i, %two)\n  ROOT %out"
    text = text.replace("ROOT %out", more).replace(
        "tuple(%i, %written", "tuple(%k, %written"
    )
    assert parse(text).weights["body"] == 4
    assert parse(text).guessed == ()


def test_an_attribute_over_several_lines_ends_no_computation():
    split = 'custom-call(%x), metadata={"a":\n{"b":"c"\n}}, backend_config={}\n'
    text = STEP.replace("  %whole = ", f"  %kernel = f32[] {split}  %whole = ")
    assert parse(text).computations["layer"].root.name == "next"


def test_a_computation_of_another_core_ends_where_it_ends():
    """As TPU7x has them for what its sparse cores send."""
    ends = "dynamic_slice_sizes={8,128}\n}"
    assert ends in STEP
    text = STEP.replace(ends, ends + ', execution_thread="sparsecore"')
    assert parse(text) == parse(STEP)


def test_another_tiling_is_no_read_of_all_of_it():
    """As TPU7x writes a layer that is read out of the stack."""
    stack = "bf16[3,256,128]{2,1,0:T(16,128)(2,1)}"
    tiling = f"""
%tiling (t.0: bf16[3,256,128]) -> bf16[3,256,128] {{
  %t.0 = {stack} parameter(0)
  ROOT %t.1 = {stack} copy(%t.0)
}}
"""
    tiled = (
        f"%tiled = {stack} fusion(%p.0), kind=kLoop, "
        "output_to_operand_aliasing={{}: (0, {})}, calls=%tiling"
    )
    text = STEP.replace("%read_layer", tiling + "\n%read_layer", 1)
    text = text.replace("  %cut = ", f"  {tiled}\n  %cut = ")
    text = text.replace("dynamic-slice(%p.0", "dynamic-slice(%tiled")
    assert hbm_bytes(parse(text)) == hbm_bytes(parse(STEP))
    copied = text.replace("output_to_operand_aliasing={{}: (0, {})}, ", "")
    stack, layer = 3 * 256 * 128 * 2, 256 * 128 * 2
    assert hbm_bytes(parse(copied)) - hbm_bytes(parse(STEP)) == 3 * (stack - layer)


def test_bytes_of_hbm():
    layer, whole, x = 256 * 128 * 2, 1024 * 128 * 2, 16 * 128 * 2
    read = 4 + layer + layer  # the index, one layer of the stack, and its copy
    gather = layer + whole
    products = x + whole + whole + x  # what lies between them stays on the chip
    compare = 4 + 4 + 1  # in the condition
    big, mine = 64 * 128 * 4, 8 * 128 * 4
    once = (big + mine) + (4 + 4) + 2 * mine + 2 * mine
    expected = 3 * (read + gather + products) + 3 * compare + once
    assert hbm_bytes(parse(STEP)) == expected


def test_a_collective_spread_over_fusions_is_read_and_written_once():
    """Each of them also adds eight numbers; the rest it only hands on."""
    part = """%async_collective_fusion.{n} (s: f32[1,256], t: f32[8,256], y: f32[8]) -> (f32[8], f32[1,256], f32[8,256], f32[8,256]) {{
  %s = f32[1,256]{{1,0}} parameter(0)
  %t = f32[8,256]{{1,0}} parameter(1)
  %y = f32[8]{{0}} parameter(2)
  %z = f32[8]{{0}} add(%y, %y)
  %g = f32[8,256]{{1,0}} all-gather(%s), channel_id=9, replica_groups={{}}, dimensions={{0}}
  ROOT %all = (f32[8]{{0}}, f32[1,256]{{1,0}}, f32[8,256]{{1,0}}, f32[8,256]{{1,0}}) tuple(%z, %s, %t, %g)
}}

"""  # noqa: E501 - lines as the compiler writes them
    parts = "".join(part.format(n=n) for n in (1, 2))
    call = """  %mine.{n}1 = f32[1,256]{{1,0}} constant({{...}})
  %room.{n}1 = f32[8,256]{{1,0}} constant({{...}})
  %eight.{n}1 = f32[8]{{0}} constant({{...}})
  %spread.{n} = (f32[8]{{0}}, f32[1,256]{{1,0}}, f32[8,256]{{1,0}}, f32[8,256]{{1,0}}) fusion(%mine.{n}1, %room.{n}1, %eight.{n}1), kind=kOutput, calls=%async_collective_fusion.{n}
"""  # noqa: E501
    calls = "".join(call.format(n=n) for n in (1, 2))
    text = STEP.replace("ENTRY", parts + "ENTRY")
    text = text.replace("  %start = s32", calls + "  %start = s32")
    added = hbm_bytes(parse(text)) - hbm_bytes(parse(STEP))
    assert added == (256 + 8 * 256) * 4 + 2 * (8 + 8) * 4


def test_of_a_condition_the_shortest_branch_is_run():
    text = """
%long (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %b = f32[8] add(%a, %a)
  ROOT %c = f32[8] add(%b, %b)
}

%short (d: f32[8]) -> f32[8] {
  %d = f32[8] parameter(0)
  ROOT %e = f32[8] negate(%d)
}

ENTRY %main (p: pred[], x: f32[8]) -> f32[8] {
  %p = pred[] parameter(0)
  %x = f32[8] parameter(1)
  ROOT %y = f32[8] conditional(%p, %x, %x), true_computation=%long, false_computation=%short
}
"""  # noqa: E501 - one instruction is one line
    assert parse(text).weights == {"main": 1, "short": 1}
    assert hbm_bytes(parse(text)) == 2 * 8 * 4


WALK = """
%body (c: (s32[], f32[100,4], s32[])) -> (s32[], f32[100,4], s32[]) {
  %c = (s32[], f32[100,4], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %rows = f32[100,4] get-tuple-element(%c), index=1
  %n = s32[] get-tuple-element(%c), index=2
  %new = f32[30,4] broadcast(%i), dimensions={}
  %zero = s32[] constant(0)
  %written = f32[100,4] dynamic-update-slice(%rows, %new, %i, %zero)
  ROOT %out = (s32[], f32[100,4], s32[]) tuple(%i, %written, %n)
}

%cond (d: (s32[], f32[100,4], s32[])) -> pred[] {
  %d = (s32[], f32[100,4], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  %m = s32[] get-tuple-element(%d), index=2
  ROOT %less = pred[] compare(%j, %m), direction=LT
}

ENTRY %main (x: (s32[], f32[100,4], s32[])) -> (s32[], f32[100,4], s32[]) {
  %x = (s32[], f32[100,4], s32[]) parameter(0)
  ROOT %loop = (s32[], f32[100,4], s32[]) while(%x), condition=%cond, body=%body
}
"""


def test_a_loop_over_rows_that_the_data_ends_is_taken_to_reach_the_last():
    program = parse(WALK)
    assert program.weights["body"] == 4  # 30 of 100 rows at a time
    assert program.guessed == ("loop",)
    text = WALK.replace("dynamic-update-slice(%rows, %new, %i, %zero)", "copy(%rows)")
    assert parse(text).weights["body"] == 1
    assert parse(text, unknown=7).weights["body"] == 7


def test_a_loop_that_the_data_may_end_sooner_turns_as_often_as_its_bound():
    """As decoding does: it stops at a column, or where all rows have ended. That it
    writes one of 16 layers says nothing of its turns."""
    text = WALK.replace(
        "ROOT %less = pred[] compare(%j, %m), direction=LT",
        "%most = s32[] constant(256)\n"
        "  %zero.1 = s32[] constant(0)\n"
        "  %early = pred[] compare(%j, %most), direction=LT\n"
        "  %open = pred[] compare(%m, %zero.1), direction=NE\n"
        "  ROOT %less = pred[] and(%early, %open)",
    )
    found = parse(text, unknown=256)
    assert found.weights["body"] == 256
    assert found.guessed == ("loop",)
    # Another loop than is known of:
    assert parse(text, unknown=255).weights["body"] == 4


def test_what_a_counter_is_bounded_by_is_known_unless_something_else_may_end_it():
    counter = "ROOT %less = pred[] compare(%j, %most), direction=LT"
    bound = "%most = s32[] constant(64)\n  "
    alone = WALK.replace("%m = s32[] get-tuple-element(%d), index=2", bound).replace(
        "ROOT %less = pred[] compare(%j, %m), direction=LT", counter
    )
    ended = WALK.replace("s32[])", "pred[])").replace(
        "%m = s32[] get-tuple-element(%d), index=2",
        f"%m = pred[] get-tuple-element(%d), index=2\n  {bound}",
    )
    ended = ended.replace(
        "ROOT %less = pred[] compare(%j, %m), direction=LT",
        "%early = pred[] compare(%j, %most), direction=LT\n"
        "  ROOT %less = pred[] and(%early, %m)",
    )
    for text, guessed in ((alone, ()), (ended, ("loop",))):
        found = parse(text, unknown=7)
        assert found.weights["body"] == 64
        assert found.guessed == guessed


def test_arrays_have_the_bytes_of_their_types():
    for dtype, expected in (
        ("f32", 24.0),
        ("bf16", 12.0),
        ("pred", 6.0),
        ("s4", 3.0),
        ("f8e4m3fn", 6.0),
        ("c64", 48.0),
        ("token", 0.0),
    ):
        assert Array(dtype, (2, 3)).bytes == expected


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("module @jit_step {\n}\n")


@pytest.mark.parametrize("name", ["hlo", "flops", "chips", "topology"])
def test_doctests(name):
    module = importlib.import_module(f"rkd_jax.aot.{name}")
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
