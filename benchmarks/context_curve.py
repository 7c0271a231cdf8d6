"""What one stream's next token costs at best against its context: for the hybrid, and with attention in every layer; one table.

    python -m benchmarks.context_curve
    python -m benchmarks.context_curve --model 35b-a3b --topology v6e:2x4 --mesh 1x8 --weights bf16

The planner's roofline (no compiler, no device): bytes that every device must read and write for a token over the rate of its
memory. Contexts beyond the model's own are counted as if YaRN had stretched it. The second model has the same widths, experts
and vocabulary, and full_attention_interval 1. Routing is even on average, but a token's experts do not spread evenly over
the devices: the columns `busiest` count the experts of the device that has most of them, on average over drawn tokens.
"""

from __future__ import annotations

import numpy as np
from absl import app, flags

from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.model import Model
from qwen35_jax.ops.forms import resolve_forms
from qwen35_jax.planner.jobs import Job, Placed
from qwen35_jax.planner.roofline import Roofline, make_roofline
from qwen35_jax.planner.topologies import Topology, parse_topology, stand_ins
from qwen35_jax.sharding import Sharding, make_mesh

MODEL = flags.DEFINE_enum("model", "397b-a17b", PRESETS, "which preset")
TOPOLOGY = flags.DEFINE_string("topology", "h100:8", "as of qwen35_jax.plan")
MESH = flags.DEFINE_string("mesh", "1x8", "DATAxMODEL")
WEIGHTS = flags.DEFINE_enum("weights", "fp8", ["bf16", "fp8"], "of the parameters")
CONTEXTS = flags.DEFINE_list("contexts", ["4096", "32768", "262144", "1048576"], "tokens in the cache")


def decode(job: Job, config: ModelConfig, mesh: str, topology: Topology) -> Roofline:
    """The roofline of a token of a model that need not be a preset."""
    placed = make_mesh(mesh, stand_ins(topology))
    model = Model(config, Sharding(placed), resolve_forms(placed, config))
    return make_roofline(Placed(job, model), "decode", topology)


def busiest(config: ModelConfig, devices: int, draws: int = 20_000) -> float:
    """Experts of one token on the device that has most of them, over the mean device's."""
    rng = np.random.default_rng(0)
    chosen = np.argpartition(rng.random((draws, config.num_experts)), config.num_experts_per_tok, axis=1)
    places = chosen[:, : config.num_experts_per_tok] * devices // config.num_experts
    most = np.mean([np.bincount(row, minlength=devices).max() for row in places])
    return most * devices / config.num_experts_per_tok


def main(_) -> None:
    topology = parse_topology(TOPOLOGY.value)
    first = Job(MODEL.value, "decode", WEIGHTS.value)
    hybrid = first.config
    everywhere = hybrid.replace(full_attention_interval=1)
    uneven = busiest(hybrid, topology.size) if hybrid.num_experts else 1.0
    print(f"{MODEL.value}, {WEIGHTS.value}, one stream, {topology} as {MESH.value}")
    print(f"of a token's experts the busiest device has {uneven:.2f} times as many as the mean one")
    head = ("context", "GB a token, all", "ms", "tokens/s", "busiest: ms", "tokens/s", "attention everywhere: ms", "ratio")
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for context in map(int, CONTEXTS.value):
        job = first.replace(context=context)
        ours, other = (decode(job, config, MESH.value, topology) for config in (hybrid, everywhere))
        moved = sum(ours.memory.values())
        worst = (moved + (uneven - 1) * ours.memory.get("experts", 0.0)) / topology.chip.hbm_bandwidth
        cells = [f"{context:,}", f"{moved * topology.size / 1e9:.1f}", f"{ours.seconds * 1e3:.2f}", f"{1 / ours.seconds:,.0f}"]
        cells += [f"{worst * 1e3:.2f}", f"{1 / worst:,.0f}", f"{other.seconds * 1e3:.2f}", f"{other.seconds / ours.seconds:.2f}"]
        print("| " + " | ".join(cells) + " |")
    parts = ", ".join(f"{name} {size * topology.size / 1e9:.2f}" for name, size in ours.memory.items())
    print(f"GB of all devices at {context:,}: {parts}")


if __name__ == "__main__":
    app.run(main)
