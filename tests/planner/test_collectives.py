"""What devices send is read from a program's text, in all the forms that XLA writes."""

from dalle_jax.planner.collectives import Collective, collectives

MESH = {"data": 2, "fsdp": 4, "tensor": 1}

PROGRAM = """
HloModule jit_update

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%condition (arg: (s32[], f32[4,6])) -> pred[] {
  %bound = s32[] constant(3)
  ROOT %more = pred[] compare(%i, %bound), direction=LT
}

%body (arg: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %w = bf16[8,6]{1,0} all-gather(%v), replica_groups=[2,4]<=[8], dimensions={0}
  %sum = f32[8,6]{1,0} all-reduce(%dw), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %part = f32[2,6]{1,0} dynamic-slice(%sum, %at, %zero), dynamic_slice_sizes={2,6}
}

ENTRY %main (x: f32[4,6]) -> f32[4,6] {
  %loop = (s32[], f32[4,6]) while(%start), condition=%condition, body=%body
  %mean = f32[10]{0} all-reduce(%y), replica_groups=mesh['axis_0'=4,'axis_1'=2], GROUPS
  %all = f32[]{} all-reduce(%z), replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add
}
""".replace("GROUPS", "device_ids=([2,4]T(1,0)) {'axis_1'}, to_apply=%add")


def test_collectives_are_counted_with_their_axes_and_as_often_as_loops_run():
    found = {(x.kind, x.axes): x for x in collectives(PROGRAM, MESH)}
    assert found == {
        (x.kind, x.axes): x
        for x in (
            Collective(
                kind="all-gather", axes=("fsdp",), members=4, count=3, array_bytes=3 * 8 * 6 * 2
            ),
            Collective(
                kind="reduce-scatter", axes=("fsdp",), members=4, count=3, array_bytes=3 * 8 * 6 * 4
            ),
            Collective(kind="all-reduce", axes=("data",), members=2, count=1, array_bytes=10 * 4),
            Collective(kind="all-reduce", axes=("data", "fsdp"), members=8, count=1, array_bytes=4),
        )
    }


def test_a_ring_sends_an_all_reduce_twice_but_for_the_own_part():
    sizes = {"axes": ("data",), "members": 4, "count": 1, "array_bytes": 400}
    assert Collective(kind="all-reduce", **sizes).sent_bytes == 600
    assert Collective(kind="reduce-scatter", **sizes).sent_bytes == 300
    assert Collective(kind="all-gather", **sizes).sent_bytes == 300
