"""The reader of collectives must see every one: a silent all-gather would otherwise pass the tests that forbid it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen35_jax.planner import hlo
from qwen35_jax.planner.compiled import count_collectives
from qwen35_jax.planner.topologies import parse_topology, stand_ins
from qwen35_jax.sharding import make_mesh


def _mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def test_explicit_collectives():
    def body(x):
        x = jax.lax.all_gather(x, "model", axis=0, tiled=True)
        x = jax.lax.psum_scatter(x * 2, "model", scatter_dimension=0, tiled=True)
        x = jax.lax.all_to_all(x, "data", 0, 1, tiled=True)
        x = jax.lax.ppermute(x, "model", [(i, (i + 1) % 4) for i in range(4)])
        return jax.lax.psum(x, ("data", "model"))

    step = jax.jit(jax.shard_map(body, mesh=_mesh(), in_specs=P("model"), out_specs=P(), check_vma=False))
    text = step.lower(jax.ShapeDtypeStruct((64, 32), jnp.float32)).compile().as_text()
    whole, part = 64 * 32 * 4, 16 * 32 * 4
    found = {c.kind: (c.bytes, c.group) for c in hlo.collectives(text)}
    assert found == {
        "all-gather": (whole, 4),
        "reduce-scatter": (whole, 4),
        "all-to-all": (found["all-to-all"][0], 2),  # the CPU splits it into a tuple of pieces
        "collective-permute": (part, 0),
        "all-reduce": (part, 8),
    }
    assert hlo.counts(text, min_bytes=whole) == {"all-gather": 1, "reduce-scatter": 1}
    axes = {c.kind: c.axes for c in count_collectives(text, _mesh())}
    permute = {"collective-permute": ("model",), "all-to-all": ("data",), "all-reduce": ("data", "model")}
    assert axes == {"all-gather": ("model",), "reduce-scatter": ("model",)} | permute


@pytest.mark.parametrize(
    ("groups", "size", "axes"),
    [
        ("replica_groups=[4,2]<=[8]", 2, ("model",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1), use_global_device_ids=true", 2, ("data",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, ("replica",)),
        ("replica_groups=[2,4]<=[8]", 4, ("data", "model")),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", 4, ("replica", "model")),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", 2, ("data",)),
        ("replica_groups=mesh['replica'=2,'data'=2,'model'=2] {'data'}", 2, ("data",)),
        ("replica_groups=mesh['replica'=2,'data'=2,'model'=2] {'replica','model'}", 4, ("replica", "model")),
        ("replica_groups={}", 0, ("replica", "data", "model")),
        ("source_target_pairs={{0,4},{4,0},{1,5}}", 0, ("replica",)),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", 0, ("data", "model")),
    ],
)
def test_axes_of_groups_of_one_size(groups, size, axes):
    """On 2x2x2 any axis has two devices: only their places say which it is."""
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add\n}}"
    (found,) = count_collectives(text, make_mesh("2x2x2", jax.devices()))
    assert (found.group, found.axes) == (size, axes)


def test_partitioner_collectives_in_a_loop():
    mesh = _mesh()
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    w = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "model", None)))
    text = jax.jit(lambda x, w: jax.lax.scan(lambda c, u: (c @ u, None), x, w)[0]).lower(x, w).compile().as_text()
    assert {c.kind for c in hlo.collectives(text)} >= {"all-reduce"}
    assert all(c.group == 4 for c in hlo.collectives(text))


def test_asynchronous_forms():
    text = """
%async_computation (p: bf16[4,8]) -> bf16[8,8] {
  ROOT %rs = bf16[2,8]{1,0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main.5_spmd (p: bf16[4,8]) -> bf16[8,8] {
  %a = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/bf16[8,8]{1,0}) all-gather-start(%p), replica_groups=[1,2]<=[2]
  %b = bf16[8,8]{1,0} all-gather-done(%a), metadata={op_name="jit(f)/all-gather(x)"}
  %e = bf16[64]{0} all-reduce-start(%wrapped_concatenate.2), replica_groups=[1,2]<=[2]
  %c = f8e4m3fn[16]{0} all-reduce-start(%q), replica_groups=mesh['data'=2,'model'=4] {'data','model'}
  ROOT %d = bf16[8,8]{1,0} fusion(%b, %all-reduce.3), kind=kLoop
}
"""
    found = [(c.kind, c.bytes, c.group, c.computation, c.joined) for c in hlo.collectives(text)]
    assert found == [
        ("reduce-scatter", 64, 2, "async_computation", False),
        ("all-gather", 128, 2, "main.5_spmd", False),
        ("all-reduce", 128, 2, "main.5_spmd", True),
        ("all-reduce", 16, 8, "main.5_spmd", False),
    ]


def test_copies_of_one_collective_count_once():
    text = """
%fused_computation.1 (p: bf16[4,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,2]<=[2]
}
%async_collective_fusion.2 (p: bf16[4,8]) -> bf16[8,8] {
  %b = bf16[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,2]<=[2]
}
ENTRY %main (p: bf16[4,8]) -> bf16[8,8] {
  %c = bf16[8,8]{1,0} all-gather(%p), channel_id=8, replica_groups=[1,2]<=[2]
  %d = bf16[8,8]{1,0} all-gather(%c), channel_id=8, replica_groups=[1,2]<=[2]
}
"""
    assert hlo.counts(text) == {"all-gather": 3}


def test_ragged_ones_share_a_channel_and_are_no_copies():
    text = """
%body.1 (p: bf16[4,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} ragged-all-to-all(%p, %q, %i, %s, %o, /*index=5*/%r), channel_id=1, replica_groups={{0,1}}
}
%body.2 (p: bf16[4,8]) -> bf16[8,8] {
  %b = bf16[8,8]{1,0} ragged-all-to-all(%p, %q, %i, %s, %o, /*index=5*/%r), channel_id=1, replica_groups={{0,1}}
}
"""
    assert hlo.counts(text) == {"ragged-all-to-all": 2}


def test_trips_of_loops_multiply():
    """Nested scans of 3 and 5 with a sum over devices in each, beside a loop that ends when a condition comes true."""
    mesh = _mesh()

    def body(x):
        def inner(c, _):
            return jax.lax.psum(c, "model") * 0.25, None

        def outer(c, _):
            c = jax.lax.psum(c, "data") * 0.5
            return jax.lax.scan(inner, c, None, length=5)[0], None

        x = jax.lax.scan(outer, x, None, length=3)[0]
        return jax.lax.while_loop(lambda c: c[0, 0] < 1e9, lambda c: jax.lax.psum(c, ("data", "model")), x)

    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(("data", "model")), out_specs=P(("data", "model")), check_vma=False))
    text = step.lower(jax.ShapeDtypeStruct((64, 32), jnp.float32)).compile().as_text()
    runs = hlo.runs(text)
    found = {c.group: runs[c.computation].count for c in hlo.collectives(text)}
    assert found == {2: 3, 4: 15, 8: 1}


def test_passes_of_experts_by_all_to_all():
    """1,024 rows in passes of at most 117 are nine, in each of three layers; a loop in a pass whose trips nobody knows is one.
    What a device says to itself is nothing."""
    scope = "jit(step)/jvp()/while/body/shard_map/rows_1024_by_117/while"
    text = f"""
%body.3 (p: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups=[1,2]<=[2], metadata={{op_name="{scope}/body/while/body/psum"}}
}}
%body.2 (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %r = bf16[7488,4]{{1,0}} ragged-all-to-all(%p, %q), replica_groups=[1,64]<=[64]
  %w = (s32[], f32[8]{{0}}) while(%t), condition=%cond.3, body=%body.3, metadata={{op_name="{scope}/body/while"}}
}}
%body.1 (p: f32[8]) -> f32[8] {{
  %n = s32[64]{{0}} all-to-all(%p), channel_id=2, replica_groups=[1,64]<=[64]
  %o = f32[64]{{0}} all-reduce(%p), channel_id=3, replica_groups=[64,1]<=[64], to_apply=%add
  %w = (s32[], f32[8]{{0}}) while(%t), condition=%cond.2, body=%body.2, metadata={{op_name="{scope}" stack_frame_id=30}}
}}
ENTRY %main (p: f32[8]) -> f32[8] {{
  ROOT %v = f32[8]{{0}} while(%p), condition=%cond.1, body=%body.1, backend_config={{"known_trip_count":{{"n":"3"}}}}
}}
"""
    mesh = make_mesh("64x1", stand_ins(parse_topology("v5p:4x4x4")))
    found = {c.kind: (c.count, c.bytes, c.filled) for c in count_collectives(text, mesh)}
    assert found == {
        "ragged-all-to-all": (27, 7488 * 4 * 2, 1024 / (9 * 117)),
        "all-reduce": (27, 32, 1.0),
        "all-to-all": (3, 256, 1.0),
    }


def test_trips_that_the_tpu_compiler_leaves_in_the_condition():
    text = """
%body.2 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=[1,2]<=[2], to_apply=%add
}
%cond.2 (p: (s32[], f32[8])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(15), backend_config={"flag_configs":[]}
  %gte = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%gte, %constant.7), direction=LT, metadata={op_name="jit(f)/lt"}
}
%body.1 (p: f32[8]) -> f32[8] {
  %b = f32[8]{0} all-reduce(%x), channel_id=2, replica_groups=[1,2]<=[2], to_apply=%add
  %w = (s32[], f32[8]{0}) while(%t), condition=%cond.2, body=%body.2
}
%cond.1 (p: f32[8]) -> pred[] {
  ROOT %r = pred[] not(%done)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  ROOT %v = f32[8]{0} while(%p), condition=%cond.1, body=%body.1
}
"""
    runs = hlo.runs(text)
    assert [(c.kind, runs[c.computation].count) for c in hlo.collectives(text)] == [("all-reduce", 15), ("all-reduce", 1)]
