"""The planner's counts, on programs with known answers."""

import itertools
import math
import random
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from launch.planner import collectives, flops, hlo, loops, memory, traffic

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def module_of(f, *shapes):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) if isinstance(s, tuple) else s for s in shapes]
    return hlo.parse(jax.jit(f).lower(*shapes).compile().as_text())


def matmul_flops(module):
    runs = loops.runs(module)
    assert not runs.notes
    return sum(row.flops for row in flops.matmuls(module, runs))


def test_matmuls_of_a_scan_and_their_gradients():
    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    one = 2 * 8 * 16 * 16
    assert matmul_flops(module_of(run, (8, 16), (5, 16, 16))) == 5 * one
    grad = jax.grad(lambda x, w: run(x, w).sum(), argnums=(0, 1))
    assert matmul_flops(module_of(grad, (8, 16), (5, 16, 16))) == 3 * 5 * one

    def again(x, w):
        layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w) @ w.T)
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0].sum()

    # Forward 2 matmuls, of which only the first is recomputed; backward 4.
    module = module_of(jax.grad(again, argnums=(0, 1)), (8, 16), (5, 16, 16))
    assert matmul_flops(module) == 5 * one * 7
    rows = flops.matmuls(module, loops.runs(module))
    phases = {p: sum(r.flops for r in rows if r.phase == p) for p in {r.phase for r in rows}}
    assert phases == {"forward": 10 * one, "recomputed": 5 * one, "backward": 20 * one}


def test_nested_loops_multiply():
    def run(x, w):
        def outer(x, _):
            return jax.lax.fori_loop(2, 9, lambda i, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(outer, x, None, length=4)[0]

    assert matmul_flops(module_of(run, (8, 16), (16, 16))) == 4 * 7 * 2 * 8 * 16 * 16


def test_batched_matmuls_and_contractions_of_two_axes():
    f = lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b)  # noqa: E731
    assert matmul_flops(module_of(f, (2, 3, 8, 4), (2, 3, 6, 4))) == 2 * 2 * 3 * 8 * 6 * 4
    f = lambda a, b: jnp.einsum("qhd,hdk->qk", a, b)  # noqa: E731
    assert matmul_flops(module_of(f, (8, 3, 4), (3, 4, 5))) == 2 * 8 * 3 * 4 * 5


def test_a_loop_of_unknown_length_is_reported_and_counted_once():
    def run(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jnp.tanh(x @ w), x)

    module = module_of(run, (8, 16), (16, 16))
    runs = loops.runs(module)
    assert [row.flops for row in flops.matmuls(module, runs)] == [2 * 8 * 16 * 16]
    (note,) = runs.notes
    assert "trip count of the loop" in note and "counted once" in note


LOOP = """
%body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %p = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{{0}} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %one = s32[] constant({step})
  %next = s32[] {op}(%i, %one)
  ROOT %t = (s32[], f32[8]{{0}}, s32[]) tuple(%next, %x, %n)
}}

%compare (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction={direction}
}}

%condition (q: (s32[], f32[8], s32[])) -> pred[] {{
  %q = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %j = s32[]{{:T(128)}} get-tuple-element(%q), index=0
  %m = s32[]{{:T(128)}} get-tuple-element(%q), index=2
  ROOT %f = pred[]{{:T(512)}} fusion({sides}), kind=kLoop, calls=%compare
}}

ENTRY %main (y: f32[8]) -> f32[8] {{
  %y = f32[8]{{0}} parameter(0)
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %limit = s32[] constant({limit})
  %state = (s32[], f32[8]{{0}}, s32[]) tuple(%copied, %y, %limit)
  %w = (s32[], f32[8]{{0}}, s32[]) while(%state), condition=%condition, body=%body
  ROOT %out = f32[8]{{0}} get-tuple-element(%w), index=1
}}
"""


@pytest.mark.parametrize(
    "start, limit, step, op, direction, sides, turns",
    [
        (0, 24, 1, "add", "LT", "%j, %m", 24),
        (0, 24, 1, "add", "GT", "%m, %j", 24),
        (3, 24, 2, "add", "LE", "%j, %m", 11),
        (0, 24, 2, "add", "NE", "%j, %m", 12),
        (9, -1, 1, "subtract", "GT", "%j, %m", 10),
        (9, 0, 3, "subtract", "GE", "%j, %m", 4),
        (30, 24, 1, "add", "LT", "%j, %m", 0),
        (0, 24, 0, "add", "LT", "%j, %m", None),
        (0, 25, 2, "add", "NE", "%j, %m", None),  # it would never end
    ],
)
def test_turns_of_a_loop_that_only_its_text_tells(start, limit, step, op, direction, sides, turns):
    """The bound is carried in the loop's state, and the comparison lies in a fusion."""
    values = {"start": start, "limit": limit, "step": step, "op": op, "direction": direction}
    module = hlo.parse(LOOP.format(**values, sides=sides))
    runs = loops.runs(module)
    assert runs.trips == {"w": turns}
    assert bool(runs.notes) == (turns is None)
    assert runs.times["body"] == (1 if turns is None else turns)
    assert runs.times["condition"] == runs.times["body"] + 1


def test_a_known_trip_count_is_taken():
    config = ', backend_config={"known_trip_count":{"n":"7"}}'
    values = {"start": 0, "limit": 1, "step": 0, "op": "add", "direction": "EQ", "sides": "%j, %m"}
    text = LOOP.format(**values).replace("body=%body", "body=%body" + config)
    assert loops.runs(hlo.parse(text)).trips == {"w": 7}


def test_positions_of_a_window_that_meet_an_element():
    draw = random.Random(0).randint
    for _ in range(300):
        size, window, stride = draw(1, 7), draw(1, 5), draw(1, 4)
        low, high, base, dilation = draw(0, 4), draw(0, 4), draw(1, 3), draw(1, 3)
        dilated = (size - 1) * base + 1
        outputs = (low + dilated + high - (window - 1) * dilation - 1) // stride + 1
        if outputs < 1:
            continue
        places = itertools.product(range(outputs), range(window))
        at = [o * stride + w * dilation - low for o, w in places]
        want = sum(0 <= a < dilated and a % base == 0 for a in at)
        assert flops._meetings(size, window, stride, low, high, base, dilation) == want


def test_convolutions_as_xla_counts_them():
    """Strides, padding, dilation and groups, against XLA's own analysis of the same program."""
    for kwargs in (
        {"window_strides": (2, 1), "padding": ((1, 2), (0, 3))},
        {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": ((0, 1), (2, 0)), "lhs_dilation": (1, 3)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    ):
        groups = kwargs.get("feature_group_count", 1)
        a = jax.ShapeDtypeStruct((3, 4, 9, 8), jnp.float32)
        b = jax.ShapeDtypeStruct((6, 4 // groups, 3, 2), jnp.float32)
        program = jax.jit(lambda a, b, k=kwargs: jax.lax.conv_general_dilated(a, b, **k))
        compiled = program.lower(a, b).compile()
        assert matmul_flops(hlo.parse(compiled.as_text())) == compiled.cost_analysis()["flops"]


TPU_MATMULS = """
ENTRY %main (a: bf16[5,8,16], b: bf16[16,32,1]) -> f32[5,16,128,256] {
  %a = bf16[5,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,32,1]{1,0,2:T(8,128)(2,1)} parameter(1)
  %c = bf16[5,16,128,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %d = bf16[5,16,256,64]{3,2,1,0:T(8,128)(2,1)} parameter(3)
  %one = bf16[5,8,32]{2,1,0} convolution(%a, %b), window={size=1}, dim_labels=0bf_io0->0bf
  ROOT %two = f32[5,16,128,256]{3,2,1,0:T(8,128)} convolution(%c, %d), DILATED
}
""".replace("DILATED", "window={size=5x16 stride=4x15 lhs_dilate=5x16}, dim_labels=01bf_01oi->01bf")


def test_convolutions_that_tpus_make_of_matmuls():
    """A batch of 5 as a spatial axis, and one of 5 x 16 by dilation: products with holes do not
    count."""
    module = hlo.parse(TPU_MATMULS)
    rows = {row.name: row.flops for row in flops.matmuls(module, loops.runs(module))}
    assert rows == {"one": 2 * 5 * 8 * 16 * 32, "two": 2 * 5 * 16 * 128 * 256 * 64}


def sharded(f, shape, spec, out):
    """Collectives of a program on the 8 fake devices."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH))
    f = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    module = hlo.parse(jax.jit(f).lower(array).compile().as_text())
    rows = collectives.collectives(module, loops.runs(module), MESH)
    return collectives.by_kind_and_axes(rows)


def test_bytes_and_axes_of_collectives():
    cut = P(("fsdp", "tensor"))
    gather = lambda x: jax.lax.all_gather(x, ("fsdp", "tensor"), axis=0, tiled=True)  # noqa: E731
    whole = 64 * 32 * 4
    assert sharded(gather, (64, 32), cut, P()) == {("all-gather", "fsdp+tensor"): whole * 3 / 4}

    def scatter(x):
        return jax.lax.psum_scatter(x, "data", scatter_dimension=0, tiled=True)

    assert sharded(scatter, (64, 32), P(), P("data")) == {("reduce-scatter", "data"): whole / 2}
    add = lambda x: jax.lax.psum(x, ("data", "tensor"))  # noqa: E731
    assert sharded(add, (64, 32), P(), P()) == {("all-reduce", "data+tensor"): 2 * whole * 3 / 4}
    turn = lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)])  # noqa: E731
    assert sharded(turn, (64, 32), P("fsdp"), P("fsdp")) == {
        ("collective-permute", "fsdp"): whole / 2
    }
    swap = lambda x: jax.lax.all_to_all(x, "tensor", 1, 0, tiled=True)  # noqa: E731
    assert sharded(swap, (64, 32), P("tensor"), P(None, "tensor")) == {
        ("all-to-all", "tensor"): whole / 2 / 2
    }


def test_collectives_in_loops_count_every_turn():
    def run(w):
        def layer(x, w):
            return x + jax.lax.all_gather(w, "fsdp", axis=0, tiled=True).sum(), None

        return jax.lax.scan(layer, 0.0, w)[0]

    found = sharded(run, (6, 16, 8), P(None, "fsdp"), P())
    assert found == {("all-gather", "fsdp"): 6 * 16 * 8 * 4 / 2}


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[4,2]<=[8], x", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("source_target_pairs={{0,2},{2,0}}", [[0, 2], [2, 0]]),
    ],
)
def test_forms_of_replica_groups(text, groups):
    assert collectives.replica_groups(text, 8).tolist() == groups


def test_axes_of_groups():
    assert collectives.axes_of(np.array([[0, 1], [6, 7]]), MESH) == ("tensor",)
    assert collectives.axes_of(np.array([[0, 2], [5, 7]]), MESH) == ("fsdp",)
    assert collectives.axes_of(np.array([[0, 1, 4, 5]]), MESH) == ("data", "tensor")
    assert collectives.axes_of(np.arange(8)[None], MESH) == ("data", "fsdp", "tensor")


def test_what_moves_weights():
    def row(op_name, *axes):
        return collectives.Collective("x", op_name, "all-gather", axes, 2, "f32[2]", 1, 1.0)

    weights = [row("jit(f)/weights/all_gather", "context"), row("", "fsdp"), row("", "data")]
    weights += [row("", "fsdp", "context")]
    others = [row("jit(f)/loss_weights/psum", "context"), row("", "tensor"), row("", "expert")]
    found = collectives.split([*weights, *others])
    assert found == {"weights": weights, "activations": others}


ASYNC = """
%all-reduce-scatter (i: bf16[64,16]) -> bf16[32,16] {
  %i = bf16[64,16]{1,0} parameter(0)
  %all-reduce.1 = bf16[64,16]{1,0} all-reduce(%i), replica_groups=[4,2]<=[8], to_apply=%add
  %z = s32[] constant(0)
  ROOT %ds = bf16[32,16]{1,0} dynamic-slice(%all-reduce.1, %z, %z), dynamic_slice_sizes={32,16}
}

%wrapped (j: bf16[64,16]) -> bf16[64,16] {
  %j = bf16[64,16]{1,0} parameter(0)
  ROOT %a2a = bf16[64,16]{1,0} all-to-all(%j), replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (p: bf16[32,16], q: bf16[64,16]) -> bf16[64,16] {
  %p = bf16[32,16]{1,0} parameter(0)
  %q = bf16[64,16]{1,0} parameter(1)
  %ag = (bf16[32,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[8]
  %agd = bf16[64,16]{1,0} all-gather-done(%ag)
  %rs = bf16[32,16]{1,0} fusion(%agd), kind=kCustom, calls=%all-reduce-scatter
  %cp = (bf16[32,16], bf16[32,16], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%rs), PAIRS
  %cpd = bf16[32,16]{1,0} collective-permute-done(%cp)
  %s = ((bf16[64,16]{1,0}), bf16[64,16]{1,0}, s32[]) async-start(%q), calls=%wrapped
  %sd = bf16[64,16]{1,0} async-done(%s)
  ROOT %r = bf16[64,16]{1,0} copy(%sd)
}
""".replace("PAIRS", "source_target_pairs={{0,1},{1,0}}")


def test_asynchronous_and_fused_collectives_count_once():
    module = hlo.parse(ASYNC)
    rows = collectives.collectives(module, loops.runs(module), MESH)
    half = 64 * 16 * 2 / 2
    assert collectives.by_kind_and_axes(rows) == {
        ("all-gather", "tensor"): half,
        ("reduce-scatter", "tensor"): half,
        ("collective-permute", "tensor"): half,
        ("all-to-all", "fsdp"): half,
    }


STEPS = """
%start (p: bf16[32,16]) -> (bf16[64,16], u32[]) {
  %p = bf16[32,16]{1,0} parameter(0)
  %ag.1 = bf16[64,16]{1,0} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %c = (bf16[64,16]{1,0}, u32[]) custom-call(%p, %ag.1), custom_call_target="START"
}

%async_collective_fusion.7 (q: bf16[64,16], x: bf16[8,64]) -> (bf16[8,16], bf16[64,16]) {
  %q = bf16[64,16]{1,0} parameter(0)
  %x = bf16[8,64]{1,0} parameter(1)
  %half = bf16[32,16]{1,0} slice(%q), slice={[0:32], [0:16]}
  %ag.2 = bf16[64,16]{1,0} all-gather(%half), replica_groups=[4,2]<=[8], dimensions={0}
  %dot = bf16[8,16]{1,0} dot(%x, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) tuple(%dot, %q)
}

%done (p: bf16[32,16], r: bf16[64,16]) -> bf16[64,16] {
  %p = bf16[32,16]{1,0} parameter(0)
  %r = bf16[64,16]{1,0} parameter(1)
  %ag.3 = bf16[64,16]{1,0} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %c = bf16[64,16]{1,0} custom-call(%p, %r, %ag.3), custom_call_target="DONE"
}

ENTRY %main (a: bf16[32,16], x: bf16[8,64]) -> bf16[64,16] {
  %a = bf16[32,16]{1,0} parameter(0)
  %x = bf16[8,64]{1,0} parameter(1)
  %s = (bf16[64,16]{1,0}, u32[]) fusion(%a), kind=kCustom, calls=%start
  %g = bf16[64,16]{1,0} get-tuple-element(%s), index=0
  %m = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) fusion(%g, %x), calls=%async_collective_fusion.7
  %h = bf16[64,16]{1,0} get-tuple-element(%m), index=1
  ROOT %d = bf16[64,16]{1,0} fusion(%a, %h), kind=kCustom, calls=%done
}
"""


def test_a_collective_that_runs_in_steps_counts_once():
    """As libtpu writes it with asynchronous collective fusion; its matmuls still count."""
    text = STEPS.replace("START", "AsyncCollectiveStart").replace("DONE", "AsyncCollectiveDone")
    module = hlo.parse(text)
    runs = loops.runs(module)
    (row,) = collectives.collectives(module, runs, MESH)
    assert (row.name, row.kind, row.bytes) == ("ag.1", "all-gather", 64 * 16 * 2 / 2)
    assert matmul_flops(module) == 2 * 8 * 16 * 64


def test_attributes_of_kernels_may_have_lines_of_their_own():
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", attributes={
"blocks": {"block_q": 512
}
}, metadata={op_name="jit(f)/splash"}, backend_config={"cost_estimate":{"flops":"96"}}
  ROOT %r = f32[8]{0} copy(%k)
}

"""
    module = hlo.parse(text)
    main = module.computations["main"]
    assert list(main.instructions) == ["p", "k", "r"] and main.root.name == "r"
    (kernel,) = flops.matmuls(module, loops.runs(module))
    assert (kernel.kernel, kernel.attention, kernel.flops) == (True, True, 96)


def test_hbm_traffic_counts_slices_of_stacks_and_no_memory_on_the_chip():
    text = """
%slice (s: f32[6,8,128], i: s32[]) -> f32[8,128] {
  %s = f32[6,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %d = f32[1,8,128]{2,1,0} dynamic-slice(%s, %i, %z, %z), dynamic_slice_sizes={1,8,128}
  ROOT %b = f32[8,128]{1,0} bitcast(%d)
}

ENTRY %main (stack: f32[6,8,128], i: s32[]) -> f32[8,128] {
  %stack = f32[6,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %layer = f32[8,128]{1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%slice
  ROOT %out = f32[8,128]{1,0} copy(%layer)
}
"""
    module = hlo.parse(text)
    layer = 8 * 128 * 4
    read, written = layer + 4, layer  # a layer and its number; the copy from the chip to HBM
    assert traffic.hbm_bytes(module, loops.runs(module)) == read + written


BUFFERS = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 add.19 @0> (size=512,offset=0): bf16[]{:T(256)}
allocation 1: size 8388608, parameter 0, shape |f32[4,128,4096]| at ShapeIndex {}:
 value: <1 p @0> (size=8388608,offset=0): f32[4,128,4096]{2,1,0}
allocation 2: size 4194304, output shape is |f32[8]|, maybe-live-out:
 value: <3 o @0> (size=4194304,offset=0): f32[8]{0}
allocation 3: size 20971520, preallocated-temp:
 value: <4 grads @0> (size=8388608,offset=0): f32[4,128,4096]{2,1,0:T(8,128)}
 value: <5 again{1} (phi) @0> (size=8388608,offset=0): f32[4,128,4096]{2,1,0:T(8,128)}
 value: <6 kept @0> (size=8388608,offset=8388608): bf16[4,1,1024,1024]{3,2,1,0:T(8,128)(2,1)}
 value: <7 inside @0> (size=4194304,offset=8388608): f32[1024,1024]{1,0:T(8,128)}
 value: <8 scores @0> (size=4194304,offset=16777216): f32[1024,1024]{1,0:T(8,128)}
 value: <9 tiny @0> (size=512,offset=20971008): f32[]
allocation 4: size 83886080, color 1, preallocated-temp:
 value: <10 vmem @1> (size=33554432,offset=0): bf16[4096,4096]{1,0:T(8,128)(2,1)S(1)}
"""


def test_buffers_by_kind(tmp_path: Path):
    path = tmp_path / "buffers.txt"
    path.write_text(BUFFERS)
    mesh = jax.make_mesh((8,), ("fsdp",))
    sharding = NamedSharding(mesh, P(None, "fsdp"))
    params = {"w": jax.ShapeDtypeStruct((4, 1024, 4096), jnp.float32, sharding=sharding)}
    assert memory.local_bytes(params) == 4 * 128 * 4096 * 4
    held = memory.allocations(path, hlo.parse(ASYNC), params, {4})
    assert (held.arguments, held.temporaries, held.other) == (8 << 20, 20 << 20, 4 << 20)
    assert [(b.bytes >> 20, b.kind, b.shape) for b in held.heap] == [
        (8, "gradients", "f32[4,128,4096]"),
        (8, "kept by layers", "bf16[4,1,1024,1024]"),
        (4, "other", "f32[1024,1024]"),
    ]


def test_reading_a_program_takes_time_in_proportion():
    """Long types and 40 000 instructions; a real program has 15 000."""
    type_ = "(" + ", ".join(["f32[8,8]{1,0:T(8,128)}"] * 20) + ")"

    def seconds(count: int) -> float:
        calls = (f"  %a{i} = {type_} custom-call(%p, %p), metadata={{}}" for i in range(count))
        lines = ["ENTRY %main (p: f32[8]) -> f32[8] {", "  %p = f32[8] parameter(0)", *calls, "}"]
        text = "\n".join(lines) + "\n"
        start = time.process_time()
        module = hlo.parse(text)
        loops.runs(module)
        assert len(module.computations["main"].instructions) == count + 1
        return time.process_time() - start

    seconds(1000)  # compiles the regular expressions
    # Eight times as many; 64 times as long would be the square.
    assert seconds(40_000) < 24 * seconds(5_000)


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing\n")
    assert math.isclose(hlo.arrays_of("(bf16[2,3]{1,0:T(8,128)S(1)}, f8e4m3fn[4])")[1].bytes, 4)
