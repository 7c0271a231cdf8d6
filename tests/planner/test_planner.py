"""The planner's arithmetic without a compiler: topologies, meshes, bytes and rooflines against what is known of the models."""

from __future__ import annotations

import math

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.generate import SamplingParams, load
from qwen35_jax.generate.generation import Generation, Request
from qwen35_jax.model import parameter_counts
from qwen35_jax.ops.forms import KERNEL_CHOICES, Forms
from qwen35_jax.ops.moe.choice import all_to_all_bytes
from qwen35_jax.planner import jobs, links, planning, report
from qwen35_jax.planner.compiled import Compiled, Memory, NoRoomError
from qwen35_jax.planner.jobs import Job, Placed, shard_bytes
from qwen35_jax.planner.planning import make_plan
from qwen35_jax.planner.roofline import Transfer, all_passes, expected_transfers, interconnect, make_roofline, one_pass
from qwen35_jax.planner.search import estimate, meshes, rank
from qwen35_jax.planner.topologies import CHIPS, GIB, larger, parse_topology, stand_ins
from qwen35_jax.sharding import make_mesh, parse_mesh

PODS = {"v5p:4x4x4": 64, "v6e:8x8": 64, "tpu7x:2x2x4": 32, "h100:8": 8, "h200:8": 8, "h100:2x8": 16, "v5e:16x16": 256}


def placed(job: Job, mesh: str, topology: str) -> Placed:
    return Placed.on(job, make_mesh(mesh, stand_ins(parse_topology(topology))))


def test_the_table_of_capacities():
    found = {kind: chip.hbm for kind, chip in CHIPS.items()}
    assert found == {
        "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "tpu7x": 96 * GIB, "h100": 80 * 10**9, "h200": 141 * 10**9,
    }  # fmt: skip


@pytest.mark.parametrize(("text", "devices"), PODS.items())
def test_topologies_have_their_devices(text, devices):
    topology = parse_topology(text)
    assert (str(topology), topology.size) == (text, devices)
    ours = stand_ins(topology)
    assert len({(d.coords, d.core_on_chip) for d in ours}) == devices == len({d.id for d in ours})


@given(st.text(max_size=12) | st.from_regex(r"(v5p|v5e|h100|tpu7x):[0-9x]{0,9}", fullmatch=True))
def test_a_topology_is_one_or_a_message(text):
    try:
        topology = parse_topology(text)
    except UserError as error:
        assert repr(text) in str(error) and "\n" not in str(error).replace(repr(text), "")
    else:
        assert parse_topology(str(topology)) == topology and topology.chips == math.prod(topology.shape) > 0


@given(st.integers(1, 600))
def test_meshes_of_a_number_of_devices(count):
    found = meshes(count)
    shapes = {parse_mesh(mesh) for mesh in found}
    assert len(shapes) == len(found) and all(math.prod(shape) == count for shape in shapes)
    assert (1, count, 1) in shapes and (1, 1, count) in shapes and (count, 1, 1) in shapes


JOBS = st.builds(
    Job,
    model=st.sampled_from(["0.8b", "9b", "35b-a3b", "397b-a17b"]),
    workload=st.sampled_from(["decode", "prefill", "sample", "train"]),
    weights=st.sampled_from(["bf16", "fp8"]),
    batch=st.sampled_from([1, 3, 16, 64]),
    context=st.sampled_from([1, 100, 4096, 32768]),
    chunk=st.sampled_from([512, 2048]),
    kernels=st.sampled_from(KERNEL_CHOICES[:2]),
)


@settings(max_examples=12)
@given(JOBS, st.sampled_from(["v5e:2x4", "tpu7x:2x2x1", "h100:8", "h100:2x8"]))
def test_the_order_of_meshes(job, text):
    """Each is a mesh of all devices; what fits comes first and by its time; all devices together hold all weights and state."""
    topology = parse_topology(text)
    try:
        found = rank(job, topology)
    except UserError as error:
        assert "no mesh" in str(error)
        return
    assert all(math.prod(parse_mesh(c.mesh)) == topology.size for c in found)
    assert [c.fits for c in found] == sorted((c.fits for c in found), reverse=True)
    times = [c.seconds for c in found if c.fits]
    assert times == sorted(times)
    alone = Placed.on(job, make_mesh("1x1", stand_ins(parse_topology("h100:1"))))
    for c in found:
        assert c.weights * topology.size >= shard_bytes(alone.weights) * 0.999
        assert all(r.operations > 0 and 0 < r.seconds < 1e5 for r in c.rooflines.values())


def test_bytes_that_a_token_of_one_stream_moves():
    """On one device, in bfloat16: the active parameters without the embedding, of which it reads a row, and of the router and
    the experts; the cache of 15 attention layers with 2 heads of 256; 45 states of 64 x 128 x 128 float32, read and written."""
    job = Job("397b-a17b", "decode", batch=1, context=32768)
    memory = make_roofline(placed(job, "1x1", "h100:1"), "decode", parse_topology("h100:1")).memory
    counts = parameter_counts(job.config)
    embedding = job.config.vocab_size * job.config.hidden_size
    assert memory["dense weights"] + memory["experts"] == pytest.approx(2 * (counts["active"] - embedding), rel=1e-3)
    assert memory["experts"] == pytest.approx(60 * 10 * 3 * 4096 * 1024 * 2, rel=1e-6)
    assert memory["keys and values"] == 15 * 2 * 256 * 2 * 2 * 32768
    recurrent, windows = 45 * 64 * 128 * 128 * 4, 45 * 3 * (16 + 16 + 64) * 128 * 2
    assert memory["recurrent state"] == pytest.approx(2 * (recurrent + windows), rel=1e-6)


def test_fp8_halves_the_experts_and_many_tokens_reach_all():
    def memory(**changes):
        job = Job("397b-a17b", "decode", context=4096).replace(**changes)
        return make_roofline(placed(job, "8x1", "h100:8"), "decode", parse_topology("h100:8")).memory

    one, many = memory(weights="bf16", batch=8), memory(weights="fp8", batch=1024)
    assert memory(weights="fp8", batch=8)["experts"] == pytest.approx(one["experts"] / 2, rel=1e-3)  # and a scale a block
    stored = 60 * 512 * 3 * 4096 * 1024 / 8
    assert many["experts"] == pytest.approx(stored, rel=1e-3)
    assert one["experts"] == pytest.approx(2 * stored * (1 - (1 - 10 / 512) ** 8), rel=1e-3)


def test_operations_of_prefill_and_training():
    """Two for each active parameter and token, beside which a short context's attention is small; of training four times as
    many (forward, again, twice backward), and the head and the layer for multi-token prediction with them."""
    job = Job("9b", "prefill", batch=1, context=512, chunk=512)
    topology, counts = parse_topology("h100:1"), parameter_counts(job.config)
    ends = job.config.vocab_size * job.config.hidden_size
    prefill = make_roofline(placed(job, "1x1", "h100:1"), "prefill", topology)
    assert prefill.operations == pytest.approx(2 * (counts["active"] - 2 * ends) * 512, rel=0.03)
    train = make_roofline(placed(job.replace(workload="train"), "1x1", "h100:1"), "train", topology)
    assert train.operations == pytest.approx(8 * (counts["active"] + counts["mtp"]) * 512, rel=0.03)
    assert train.compute_seconds == pytest.approx(train.operations / 989.4e12)


@pytest.mark.parametrize(
    ("topology", "mesh", "axes", "rate"),
    [
        ("v5p:4x4x4", "64x1", ("data",), 600e9),  # three rings, two links each
        ("v5p:4x4x4", "16x4", ("model",), 200e9),
        ("v5p:2x2x2", "8x1", ("data",), 300e9),  # no rings below a cube: one link each
        ("v5e:2x4", "8x1", ("data",), 100e9),
        ("v5e:16x16", "256x1", ("data",), 200e9),
        ("v6e:8x8", "8x8", ("model",), 100e9),
        ("tpu7x:2x2x1", "4x2", ("model",), 600e9),  # the two halves of a chip
        ("h100:8", "2x4", ("model",), 450e9),
        ("h100:2x8", "2x8", ("model",), 450e9),
        ("h100:2x8", "2x8", ("data",), 50e9),  # pairs of two nodes, each with its own network card
        ("h100:2x8", "16x1", ("data",), 450e9),  # 15/16 of an array a device, 1/2 of it through 8 cards of a node
    ],
)
def test_how_fast_the_devices_of_an_axis_talk(topology, mesh, axes, rate):
    topology = parse_topology(topology)
    assert links.bandwidth(make_mesh(mesh, stand_ins(topology)), topology, axes) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize(
    ("topology", "mesh", "axes", "rate"),
    [
        ("v5p:4x4x4", "64x1", ("data",), 100e9),
        ("tpu7x:2x2x1", "4x2", ("model",), 600e9),
        ("h100:8", "8x1", ("data",), 450e9),
        ("h100:2x8", "16x1", ("data",), 50e9),  # the ring goes from node to node, and all wait for those who stand there
        ("h100:2x8", "2x8", ("model",), 450e9),
    ],
)
def test_a_permute_comes_over_one_link(topology, mesh, axes, rate):
    topology = parse_topology(topology)
    mesh, sent = make_mesh(mesh, stand_ins(topology)), [(Transfer("collective-permute", 1e9, axes, 3), 2)]
    assert list(interconnect(sent, mesh, topology).values()) == [(6e9, pytest.approx(rate))]


def test_a_prompt_is_read_in_the_parts_that_sample_reads():
    """2,048 tokens and then 1,024, not twice 2,048; of a compiled program for 2,048 the other takes half."""
    job, topology = Job("35b-a3b", "prefill", batch=8, chunk=2048), parse_topology("v5p:2x2x1")
    ours = {context: placed(job.replace(context=context), "2x2", "v5p:2x2x1") for context in (2048, 3000, 4096)}
    assert [[p.length for p in all_passes(x, "prefill")] for x in ours.values()] == [[2048], [2048, 1024], [2048]]
    found = {context: make_roofline(x, "prefill", topology) for context, x in ours.items()}
    assert [r.calls for r in found.values()] == [1, 2, 2]
    for part in ("operations", "interconnect_seconds"):
        one, middle, two = (getattr(r, part) for r in found.values())
        assert middle == pytest.approx(one + (two - one) / 2, rel=0.06), part  # attention sees more where the prompt is longer
    sent = [Transfer("all-reduce", 1e6, ("model",), 4)]
    times = [make_roofline(x, "prefill", topology, sent).interconnect_seconds for x in ours.values()]
    assert [t / times[0] for t in times] == pytest.approx([1, 1.5, 2])


@pytest.mark.parametrize("mesh", ["64x1", "16x4"])
def test_rows_to_experts_are_those_of_the_rule(mesh):
    """What the roofline sends a layer is what `ops.moe` counts when it chooses the form."""
    topology, job = parse_topology("v5p:4x4x4"), Job("35b-a3b", "prefill", batch=64, context=8192, chunk=8192)
    placed = Placed.on(job, make_mesh(mesh, stand_ins(topology)))
    one, c, (_, data, model) = one_pass(placed, "prefill"), placed.config, parse_mesh(mesh)
    (sent,) = [t for t in expected_transfers(one) if t.kind == "ragged-all-to-all"]
    received = sent.count * sent.bytes * (data - 1) / data
    sizes = one.tokens, c.num_experts_per_tok, c.hidden_size, 2, data, model
    assert received == pytest.approx(c.num_hidden_layers * all_to_all_bytes(*sizes))


def exchanged(job: Job, step: str) -> list[tuple[str, int, float]]:
    """(kind, how often, MiB that a device takes in each time) over `data` on 16x4; of permutes all that is sent on."""
    one, found = one_pass(placed(job, "16x4", "v5p:4x4x4"), step), []
    for t in expected_transfers(one):
        if "data" in t.axes and t.kind != "ragged-all-to-all":
            part = {"collective-permute": 1.0, "all-reduce": 2 * 15 / 16}.get(t.kind, 15 / 16)
            found.append((t.kind, t.count, round(t.bytes * part / 2**20, 2)))
    return found


def test_what_cut_sequences_exchange():
    """The table of docs/scaling.md, "Bytes": 397B-A17B, 45 layers of Gated DeltaNet and 15 of attention, 65,536 tokens."""
    job = Job("397b-a17b", "sample", context=65536, chunk=65536, context_parallel=True)
    maps, state = ("collective-permute", 45, 8.0), ("all-reduce", 45, 1.88)
    assert exchanged(job, "prefill") == [maps, state, ("all-gather", 15, 240.0), ("reduce-scatter", 15, 480.0)]
    experts, outputs = exchanged(job, "decode")
    assert experts[:2] == ("all-reduce", 60) and outputs[:2] == ("all-reduce", 15)
    assert outputs[2] == pytest.approx(2 * 4 * 8 * 256 / 2**20 * 15 / 16, abs=0.01)
    maps, ring, *parameters = exchanged(job.replace(workload="train"), "train")
    assert maps == ("collective-permute", 135, 8.0)  # forward, again, backward
    assert ring == ("collective-permute", 16, 60.0 + 60.0 + 192.0)  # and the layer for multi-token prediction
    assert [kind for kind, *_ in parameters] == ["all-gather", "reduce-scatter"]


def test_what_fully_sharded_inference_gathers():
    """27b on 8x1, docs/scaling.md: 54 GB of weights come in for a prefill or a token, the head for a token alone."""
    config = ModelConfig.preset("27b")
    table = 2 * config.vocab_size * config.hidden_size
    units = 2 * parameter_counts(config)["text"] - 2 * table
    job = Job("27b", "sample", batch=8, fully_sharded=True)
    for step, ends in (("prefill", table), ("decode", 2 * table)):
        (gather,) = [t for t in expected_transfers(one_pass(placed(job, "8x1", "v5e:2x4"), step)) if t.kind == "all-gather"]
        assert gather.count == 1 and gather.bytes == pytest.approx(units + ends, rel=1e-4)


def test_images_beside_cut_sequences():
    """The tower is not cut as sequences are: its rows lie over all data shards."""
    job = Job("0.8b", "prefill", context=4096, image_tokens=2048, context_parallel=True)
    here = placed(job, "4x2", "v5p:2x2x2")
    assert here.images[0] == here.tower.sharding.size(here.tower.layout.rows) >= 4


@pytest.mark.parametrize(
    ("job", "mesh", "message"),
    [
        ({"workload": "train", "fully_sharded": True}, "8x1", "fully_sharded is of inference"),
        ({"workload": "train", "yarn": 4.0}, "8x1", "yarn is of inference"),
        ({"workload": "train", "context": 4095, "context_parallel": True}, "8x1", "4095; it must be a multiple of the 8 parts"),
        ({"workload": "train", "context": 16, "context_parallel": True}, "8x1", "of at least 3 tokens"),
        ({"workload": "decode", "fully_sharded": True}, "1x8", "mesh 1x8 has none: use one such as 8x1"),
        ({"workload": "decode", "context_parallel": True}, "1x8", "use one such as 8x1"),
        ({"workload": "decode", "moe": "gather"}, "8x1", "experts"),
        ({"workload": "decode", "chunk": 0}, "8x1", "--prefill_chunk is 0"),
        ({"workload": "decode", "yarn": float("inf")}, "8x1", "yarn is inf"),
    ],
)
def test_layouts_that_cannot_be(job, mesh, message):
    with pytest.raises(UserError, match=message):
        make_plan(Job("4b", **job), parse_topology("v5p:2x2x2"), mesh, count=0)


def test_yarn_makes_a_model_take_more():
    job = Job("4b", "decode", context=2**20, yarn=4.0, context_parallel=True)
    assert make_plan(job, parse_topology("v5p:2x2x2"), "8x1", count=0).fits


def test_which_units_are_stacked():
    """On GPUs those are not that our kernels run."""

    def stacked(model: str, topology: str, **options) -> bool:
        return placed(Job(model, "decode", batch=8, **options), "2x4", topology).model.stacked

    assert stacked("9b", "v5e:2x4") and stacked("9b", "h100:8", fully_sharded=True)
    for model, weights in (("9b", "bf16"), ("9b", "fp8"), ("35b-a3b", "bf16"), ("35b-a3b", "fp8")):
        assert stacked(model, "h100:8", weights=weights) != HAS_MOSAIC_GPU
        assert stacked(model, "h100:8", weights=weights, kernels="xla")


def test_units_that_are_not_stacked(monkeypatch):
    """No unit's weights are among the estimated temporaries, where a scan would copy them."""
    job, found = Job("9b", "decode", batch=8), []
    for forms in (Forms(), Forms(gated_delta_rule="pallas_gpu")):
        monkeypatch.setattr(jobs, "resolve_forms", lambda *_, forms=forms, **__: forms)
        found.append((placed(job, "2x4", "h100:8"), estimate(job, "2x4", parse_topology("h100:8")).temporaries))
    (stacked, with_unit), (apart, without) = found
    assert stacked.model.stacked and not apart.model.stacked
    for one in (stacked, apart):
        assert isinstance(one.weights["units"], tuple) == isinstance(one.state["k"], tuple) == (one is apart)
    assert shard_bytes(apart.weights) == shard_bytes(stacked.weights) and shard_bytes(apart.state) == shard_bytes(stacked.state)
    assert with_unit - without == shard_bytes(apart.weights["units"][0])


def test_what_a_device_takes_in():
    assert links.taken_in("all-gather", 8e9, 8) == pytest.approx(7e9)
    assert links.taken_in("all-reduce", 8e9, 8) == pytest.approx(14e9)
    assert links.taken_in("collective-permute", 8e9, 0) == pytest.approx(8e9)


def test_weights_and_state_are_what_sample_reports():
    """Within 1 %, of the stats of a run on eight virtual devices: tiny, its batch of 3 filled up to 4 rows."""
    lm = load("tiny", "4x2")
    lm.generate([[1] * 40] * 3, max_new_tokens=2, temperature=0.0)
    _compare(lm.stats()["weight_bytes_per_device"], lm.stats()["state_bytes_per_device"], "4x2", "bf16")


@pytest.mark.parametrize(("mesh", "weights"), [("8x1", "bf16"), ("2x4", "bf16"), ("2x2x2", "bf16"), ("4x2", "fp8")])
def test_weights_and_state_are_what_sample_would_report(mesh, weights):
    """The same of the arrays that are loaded, and of the shapes of the state that a batch would have."""
    lm = load("tiny", mesh, random_weights=True, keep_fp8=weights == "fp8")
    request = Request([1] * 40, 2, SamplingParams(temperature=0.0))
    shapes = Generation(lm.programs, [request] * 3, 2048).session_shapes()
    _compare(lm.stats()["weight_bytes_per_device"], shard_bytes(shapes["state"]), mesh, weights)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [("8x1", {"context_parallel": True, "yarn": 2.0}), ("2x2x2", {"context_parallel": True}), ("4x2", {"fully_sharded": True})],
)
def test_weights_and_state_of_other_layouts_are_what_sample_would_report(mesh, options):
    """Cut sequences, whose cache is a multiple of a prefill's call (416 of 104 for 300 tokens on 8x1); weights cut over the data
    axes."""
    lm = load("tiny", mesh, random_weights=True, **options)
    request = Request([1] * 298, 2, SamplingParams(temperature=0.0))
    generation = Generation(lm.programs, [request] * 3, 100)
    stored, state = lm.stats()["weight_bytes_per_device"], shard_bytes(generation.session_shapes()["state"])
    _compare(stored, state, mesh, "bf16", context=300, chunk=100, **options)
    assert mesh != "8x1" or generation.capacity == 416


def _compare(weight_bytes: int, state_bytes: int, mesh: str, weights: str, **options):
    job = Job("tiny", "sample", weights, **{"batch": 3, "context": 42} | options)
    ours = Placed.on(job, make_mesh(mesh, jax.devices()))
    assert shard_bytes(ours.weights) == pytest.approx(weight_bytes, rel=0.01)
    assert shard_bytes(ours.state) == pytest.approx(state_bytes, rel=0.01)


def test_what_does_not_fit_says_what_would():
    """397B in bfloat16 has 794 GB and eight H100 640: FP8 or a second node. Each piece of advice holds when it is taken."""
    job, topology = Job("397b-a17b", "decode", batch=64, context=32768), parse_topology("h100:8")
    plan = make_plan(job, topology, count=0)
    assert not plan.fits and plan.advice == ["--weights fp8", "--topology h100:2x8"]
    assert make_plan(job.replace(weights="fp8"), topology, count=0).fits
    assert make_plan(job, parse_topology("h100:2x8"), count=0).fits
    crowded = job.replace(weights="fp8", batch=1024)
    advice = make_plan(crowded, topology, count=0).advice
    batch = next(int(text.split()[1]) for text in advice if text.startswith("--batch"))
    assert make_plan(crowded.replace(batch=batch), topology, count=0).fits
    assert not make_plan(crowded.replace(batch=2 * batch), topology, count=0).fits


def test_a_mesh_that_does_not_fit_says_which_would():
    """And what the mesh itself would hold, each of which it does."""
    job, topology = Job("397b-a17b", "decode", "fp8", batch=64, context=32768), parse_topology("h100:8")
    plan = make_plan(job, topology, "1x8", count=0)
    assert not plan.fits
    assert plan.advice == ["--mesh 4x2", "--batch 32", "--context 16384", "--topology h100:2x8 without --mesh"]
    assert make_plan(job, topology, "4x2", count=0).fits and make_plan(job, parse_topology("h100:2x8"), count=0).fits
    for changes in ({"batch": 32}, {"context": 16384}):
        assert make_plan(job.replace(**changes), topology, "1x8", count=0).fits


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_compiled_and_does_not_fit_has_the_next_mesh_tried(monkeypatch, count):
    """As where temporaries come out larger than they were estimated."""
    job, topology = Job("0.8b", "decode", batch=8), parse_topology("v5p:2x2x1")
    order = [c.mesh for c in rank(job, topology)]
    memory = Memory(0, 0, 0, 0, 2 * topology.hbm, 0, 0)
    monkeypatch.setattr(planning, "compile_job", lambda *_: [Compiled("decode", memory, [], None, 0.0, 0.0)])
    plan = make_plan(job, topology, count=count)
    assert not plan.fits and plan.advice[0] == f"--mesh {order[count]} (or --compile {count + 1})"
    named = make_plan(job, topology, order[1], count=1)
    assert not named.fits and named.advice[0] == f"--mesh {order[0]}"


def test_what_the_compiler_has_no_room_for_is_a_plan_that_does_not_fit(monkeypatch):
    """The compiler of TPUs ends instead of saying how much it would take: of one mesh, and the next is tried."""
    job, topology = Job("0.8b", "decode", batch=8), parse_topology("v5p:2x2x1")
    first, second, *_ = (c.mesh for c in rank(job, topology))

    def compile_job(_, mesh, __):
        if mesh == first:
            raise NoRoomError(f"on {mesh}: RESOURCE_EXHAUSTED")
        return [Compiled("decode", Memory(1, 0, 0, 0, 0, 0, 0), [], None, 0.0, 0.0)]

    monkeypatch.setattr(planning, "compile_job", compile_job)
    plan = make_plan(job, topology, count=1)
    assert not plan.fits and plan.refused == {first: f"on {first}: RESOURCE_EXHAUSTED"} and not plan.compiled
    assert plan.advice[0] == f"--mesh {second} (or --compile 2)"
    text = "\n".join(report.lines(plan))
    assert f"\non {first}: RESOURCE_EXHAUSTED\n" in text and "Does not fit (compiled: a device" in text, text
    assert make_plan(job, topology, count=2).fits


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("v6e:3x3", "the next that there is, is v6e:4x4"),
        ("v5e:16x32", "the largest have 256 chips"),
        ("v5p:3x5x7", "is v5p:4x4x8"),
        ("v5p:1x1x1", "is v5p:2x2x1"),
        ("v5p:16x16x28", "the largest have 6144 chips"),
    ],
)
def test_slices_that_there_are_not(text, near):
    with pytest.raises(UserError, match=f"there is no such slice of {text.partition(':')[0]}; .*{near}$"):
        parse_topology(text)


@pytest.mark.parametrize(
    ("text", "following"),
    [
        ("v5e:1x1", ["2x2", "2x4", "4x4"]),
        ("v5e:8x16", ["16x16"]),
        ("v6e:16x16", []),
        ("v5p:2x2x1", ["2x2x2", "2x2x4", "2x4x4"]),
        ("v5p:8x16x16", ["16x16x16"]),
        ("tpu7x:8x16x16", ["16x16x16", "16x16x32"]),
        ("h100:1", ["2", "4", "8"]),
        ("h100:5", ["8", "2x8", "4x8"]),
        ("h200:2x8", ["4x8", "8x8", "16x8"]),
    ],
)
def test_larger_slices_are_such_as_there_are(text, following):
    found = [str(topology) for topology in larger(parse_topology(text), 3)]
    assert found == [f"{text.partition(':')[0]}:{shape}" for shape in following]
    assert all(str(parse_topology(each)) == each for each in found)


@pytest.mark.parametrize(("text", "gathered"), [("v5p:8x8x8", False), ("h100:64x8", True)])
def test_training_with_one_sequence_a_device(text, gathered):
    """8,192 tokens a device and experts over all 512: GPUs would gather all 4 million tokens on each, and need replicas that
    share fewer; TPUs send each row to its experts, as `moe_form` says."""
    job, topology = Job("397b-a17b", "train", batch=512, context=8192), parse_topology(text)
    assert estimate(job, "512x1", topology).fits != gathered
    best = rank(job, topology)[0]
    assert best.fits and (parse_mesh(best.mesh)[0] > 1 or not gathered)
    counts = parameter_counts(ModelConfig.preset("397b-a17b"))
    masters_and_moments = 12 * (counts["text"] + counts["mtp"])
    assert best.weights + best.state == pytest.approx(masters_and_moments / 512, rel=0.01)


def test_images_of_a_prompt():
    """16,384 tokens are one image of 65,536 patches, the largest; the tower's weights lie beside the model's."""
    job = Job("0.8b", "prefill", context=20480, image_tokens=16384)
    here = placed(job, "1x4", "v5p:2x2x1")
    rows, patches, calls = here.images
    assert (patches, calls) == (65536, 1) and rows == here.sharding.size(here.tower.layout.rows)
    found = estimate(job, "1x4", parse_topology("v5p:2x2x1"))
    without = estimate(job.replace(image_tokens=0), "1x4", parse_topology("v5p:2x2x1"))
    assert list(found.rooflines) == ["vision", "prefill"] and list(without.rooflines) == ["prefill"]
    assert found.weights - without.weights == shard_bytes(here.tower.abstract_params())
    # The scores of 65,536 patches and what they weigh are 158 Tflop of 12 blocks of 768 features; products are a tenth of that.
    ways = 4 if here.tower.layout.heads == "N" else 1
    assert 160e12 < found.rooflines["vision"].operations * ways < 175e12
    two = placed(job.replace(context=32768, image_tokens=20000), "1x4", "v5p:2x2x1")
    assert two.images[1] >= 4 * 10000 and two.images[0] * two.images[2] >= 2


@pytest.mark.parametrize(
    ("workload", "tokens", "message"),
    [("decode", 8, "need --workload prefill or sample"), ("prefill", 5000, "a prompt has 4096")],
)
def test_images_that_cannot_be(workload, tokens, message):
    with pytest.raises(UserError, match=message):
        Job("0.8b", workload, image_tokens=tokens)
