"""The least a step can take: operations, bytes of memory and bytes between devices over the rates of the data sheets.

All figures are of one device, counted from the configuration and the abstract arrays, without a compiler. What they assume
is in ASSUMPTIONS, which the planner prints.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

from qwen35_jax.config import ModelConfig
from qwen35_jax.planner import links
from qwen35_jax.planner.jobs import IMAGE, Placed, shard_bytes
from qwen35_jax.planner.topologies import Topology
from qwen35_jax.sharding import Sharding

ASSUMPTIONS = (
    "rates are those of the data sheets; compute, memory and interconnect run beside each other, so the slowest is the bound",
    "no latency: a collective costs its bytes alone, a kernel nothing to start",
    "interconnect: a device takes in (n - 1)/n of an array over n devices, of an all-reduce twice, over all its links to them",
    "a permute brings what one other device sends, over one link; on GPUs of several nodes over one network card",
    "memory: each weight and each part of the state is read once a pass, each product's input and output once",
    "experts: even routing, so tokens of the group reach 1 - (1 - k/E)^tokens of them; weights of the others are not read",
    "experts by all-to-all: as many passes, and of their buffers so much filled, as even routing takes",
    "decode: the cache is full and read whole; prefill and training: causal attention does half of all scores",
    "training: forward, forward again (remat full) and a backward pass of twice its operations",
    "cut sequences: every shard does as much as the mean, though in training the last one attends to twice that",
    "bfloat16 rates, but for FP8 training, where FP8 rates are taken for all products",
)
GDN_CHUNK = 64  # tokens of a chunk of the delta rule


@dataclasses.dataclass(frozen=True)
class Transfer:
    """`count` collectives of one kind and size (as `hlo.Collective` counts bytes) over the devices along `axes`."""

    kind: str
    bytes: float
    axes: tuple[str, ...]
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Roofline:
    """One step on one device: operations, bytes of memory by what they are, and the times in seconds. interconnect: {mesh axes:
    (bytes that the device takes in over them, bytes a second at which it can)}."""

    operations: float
    memory: dict[str, float]
    compute_seconds: float
    memory_seconds: float
    interconnect: dict[str, tuple[float, float]]
    tokens: int  # of the whole step, over all devices
    calls: int = 1  # of the program, which together are the step: all parts of a prompt, all images

    @property
    def interconnect_seconds(self) -> float:
        """One collective after the other."""
        return sum(size / rate for size, rate in self.interconnect.values())

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds, self.interconnect_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def bound(self) -> str:
        times = {name: getattr(self, f"{name}_seconds") for name in ("compute", "memory", "interconnect")}
        return max(times, key=times.get)


@dataclasses.dataclass(frozen=True)
class Pass:
    """Tokens that go through the model together: `length` of each of a device's rows. A step has `count` passes."""

    placed: Placed
    step: str
    length: int
    count: int = 1

    @property
    def sharding(self) -> Sharding:
        return self.placed.sharding.for_one_token() if self.step == "decode" else self.placed.sharding

    @property
    def cuts(self) -> int:
        """Parts of a sequence, each on a device of its own."""
        return self.sharding.size("T")

    @property
    def tokens(self) -> int:
        """Of one device."""
        return self.placed.rows * self.length // self.cuts

    @property
    def repeated(self) -> bool:
        """Whether all data shards have the same tokens: one of each sequence, with context parallelism."""
        return self.sharding.context_parallel and self.sharding.one_token

    @property
    def group(self) -> int:
        """Of all devices that share the experts."""
        return self.tokens * (1 if self.repeated else self.placed.sharding.mesh.shape["data"])

    @property
    def experts_form(self) -> str:
        """gather or all_to_all: how tokens and experts meet, where there are experts."""
        return "gather" if self.repeated else self.placed.model.moe_form(self.placed.slots * self.length)

    @property
    def sent_rows(self) -> float:
        """Rows that a device sends to the experts of its column in a layer, if routing is even; 0 where tokens are gathered."""
        c, s = self.placed.config, self.placed.sharding
        if not c.num_experts or self.experts_form == "gather":
            return 0
        columns = s.model if "model" in s.expert_axes({"E": c.num_experts})[0] else 1
        return self.tokens * c.num_experts_per_tok / columns

    @property
    def live(self) -> int:
        """Those of the group that are no filling."""
        return min(self.placed.job.batch * self.length, self.group)


def make_roofline(placed: Placed, step: str, topology: Topology, transfers: list[Transfer] | None = None) -> Roofline:
    """Of one step of a job (decode: one token of each sequence; prefill: the whole prompts; vision: all their images).
    `transfers`: those of one pass of the compiled program, in place of those that the model's form asks for: of a prefill of its
    longest part, and of a shorter one as much less."""
    if step == "vision":
        return _vision_roofline(placed, topology, transfers)
    job, chip, mesh = placed.job, topology.chip, placed.sharding.mesh
    passes, memory = all_passes(placed, step), collections.Counter()
    operations = sum(_operations(p) * p.count for p in passes) * (4 if step == "train" else 1)
    for p in passes:
        memory.update(_memory(p))
    rate = chip.fp8 if job.training and job.weights == "fp8" else chip.bf16
    if transfers is None:
        sent = [(t, p.count) for p in passes for t in expected_transfers(p)]
    else:
        longest = passes[0].length
        sent = [(t, sum(p.count * p.length / longest for p in passes)) for t in transfers]
    return Roofline(
        operations,
        {name: size for name, size in memory.items() if size},
        operations / rate,
        memory.total() / chip.hbm_bandwidth,
        interconnect(sent, mesh, topology),
        job.batch * (1 if step == "decode" else job.context),
        sum(p.count for p in passes),
    )


def interconnect(sent: list[tuple[Transfer, float]], mesh: Any, topology: Topology) -> dict[str, tuple[float, float]]:
    """What a device takes in of transfers, each so many times, by the mesh axes over which: (bytes, bytes a second)."""
    found: dict[str, tuple[float, float]] = {}
    for t, times in sent:
        name, rate = " and ".join(t.axes), links.bandwidth
        if t.kind == "collective-permute":
            name, rate = f"{name}, from one", links.step_bandwidth
        size = times * t.count * links.taken_in(t.kind, t.bytes, math.prod(mesh.shape[a] for a in t.axes))
        found[name] = (found.get(name, (0.0,))[0] + size, rate(mesh, topology, t.axes))
    return found


def all_passes(placed: Placed, step: str) -> list[Pass]:
    """What goes through the model together in a step of this name, the longest first: of a prefill the parts of the prompts."""
    if step == "prefill":
        parts = collections.Counter(placed.layout[0])
        return [Pass(placed, step, length, parts[length]) for length in sorted(parts, reverse=True)]
    return [Pass(placed, step, placed.job.context if step == "train" else 1)]


def one_pass(placed: Placed, step: str) -> Pass:
    """The longest of them."""
    return all_passes(placed, step)[0]


def _widths(config: ModelConfig, model: int) -> dict[str, list[tuple[int, int]]]:
    """(in, out) of the dense products of each kind of layer, and of the head, on one of `model` shards."""
    c, d = config, config.hidden_size

    def heads(n: int) -> int:
        return max(n, model) // model

    q, kv = heads(c.num_attention_heads) * c.head_dim, heads(c.num_key_value_heads) * c.head_dim
    key, n = heads(c.linear_num_key_heads) * c.linear_key_head_dim, heads(c.linear_num_value_heads)
    value, ffn = n * c.linear_value_head_dim, (c.shared_expert_intermediate_size or c.intermediate_size) // model
    mlp = [(d, ffn), (d, ffn), (ffn, d)] + ([(d, c.num_experts)] if c.num_experts else [])
    return {
        "attention": [(d, 2 * q), (d, kv), (d, kv), (q, d), *mlp],
        "gated_deltanet": [(d, key), (d, key), (d, value), (d, value), (d, n), (d, n), (value, d), *mlp],
        "head": [(d, c.vocab_size // model)],
    }


def _layers(config: ModelConfig, step: str) -> dict[str, int]:
    """How many layers of each kind a token passes; in training the one for multi-token prediction too."""
    mtp = config.mtp_num_hidden_layers if step == "train" else 0
    attention = config.num_units
    return {
        "attention": attention + mtp,
        "gated_deltanet": config.num_hidden_layers - attention,
        "head": 1 + mtp if step != "prefill" else 0,
    }


def _expert_rows(one: Pass) -> float:
    """Rows, each through all of an expert's width, that a device multiplies in a layer, if routing is even."""
    c, s = one.placed.config, one.placed.sharding
    axes = s.expert_axes({"E": c.num_experts, "F": c.moe_intermediate_size})
    ways = math.prod(s.mesh.shape[a] for part in axes for a in part)
    return one.live * c.num_experts_per_tok / ways


def _operations(one: Pass) -> float:
    c, m, layers = one.placed.config, one.placed.sharding.model, _layers(one.placed.config, one.step)
    widths = _widths(c, m)
    total = sum(layers[kind] * sum(2 * i * o for i, o in widths[kind]) for kind in layers) * one.tokens
    if c.num_experts:
        total += c.num_hidden_layers * _expert_rows(one) * 6 * c.hidden_size * c.moe_intermediate_size
    # Where the cache is cut, a shard attends to its part: for a token to so much less, in a prefill from all shards' queries.
    seen = one.placed.capacity / one.placed.sharding.size("T") if one.step == "decode" else one.placed.job.context / 2
    total += layers["attention"] * one.tokens * 4 * (max(c.num_attention_heads, m) // m) * c.head_dim * seen
    per_head = 6 * c.linear_key_head_dim * c.linear_value_head_dim
    per_head += 0 if one.step == "decode" else 8 * c.linear_value_head_dim * GDN_CHUNK
    passes = 2 if one.cuts > 1 else 1  # the second is of the affine map of the state that enters a shard
    return total + layers["gated_deltanet"] * one.tokens * (max(c.linear_num_value_heads, m) // m) * per_head * passes


def _memory(one: Pass) -> dict[str, float]:
    """Bytes read and written in the step, by what they are."""
    c, placed, n = one.placed.config, one.placed, one.count
    experts, dense = _weight_bytes(placed.params, c.tie_word_embeddings, one.step)
    hit = 1 - (1 - c.num_experts_per_tok / c.num_experts) ** one.live if c.num_experts else 0
    if one.step == "train":
        # Gathered and read: forward, again, and for both gradients. The optimizer reads four arrays and writes three.
        optimizer = 7 * shard_bytes(placed.weights)
        return {"weights": 6 * (dense + experts * hit), "optimizer": optimizer, "activations": 4 * _activations(one)}
    cache = shard_bytes([placed.state[name] for name in ("k", "v")])
    return {
        "dense weights": n * dense,
        "experts": n * experts * hit,
        "keys and values": cache if one.step == "decode" else n / 2 * cache,
        "recurrent state": n * 2 * (shard_bytes(placed.state) - cache),
        "activations": n * _activations(one),
    }


def _weight_bytes(params: dict, tied: bool, step: str) -> tuple[int, int]:
    """Bytes on a device of (routed experts, all else) that a pass reads; of an embedding only rows are."""
    read = {name: tree for name, tree in params.items() if name != "mtp" or step == "train"}
    if step == "prefill":
        read = {name: tree for name, tree in read.items() if name not in ("embed", "lm_head")}
    elif step == "decode" and not tied:
        read.pop("embed")
    experts = shard_bytes(_experts(read))
    return experts, shard_bytes(read) - experts


def _experts(tree: Any) -> list:
    """The subtrees of routed experts' weights."""
    if not isinstance(tree, dict):
        return []
    return [x for name, node in tree.items() for x in ([node] if name == "experts" else _experts(node))]


def _activations(one: Pass) -> float:
    """Bytes of all products' inputs and outputs in one forward pass."""
    c, layers = one.placed.config, _layers(one.placed.config, one.step)
    widths, size = _widths(c, one.placed.sharding.model), 4 if c.dtype == "float32" else 2
    total = sum(layers[kind] * sum(i + o for i, o in widths[kind]) for kind in layers) * one.tokens
    if c.num_experts:
        total += c.num_hidden_layers * _expert_rows(one) * 3 * (c.hidden_size + c.moe_intermediate_size)
    return total * size


def expected_transfers(one: Pass) -> list[Transfer]:
    """The collectives of one pass that the model's form asks for: a sum over `model` after each mixer and MLP and after the
    embedding, the experts' tokens (all of the group's, or rows to those who have the experts) over `data` and back; what a cut
    sequence's layers exchange; the gathering of parameters kept in pieces, and in training their gradients' scattering."""
    c, s, layers = one.placed.config, one.placed.sharding, _layers(one.placed.config, one.step)
    count = layers["attention"] + layers["gated_deltanet"]
    local, group = (n * c.hidden_size * 2 for n in (one.tokens, one.group))
    times = 3 if one.step == "train" else 1  # forward, again, backward
    found = []
    if s.model > 1:
        # Where all data shards have the same tokens, one sum over both axes is of the experts.
        sums = 3 if c.num_experts and not one.repeated else 2
        found.append(Transfer("all-reduce", local, ("model",), times * (sums * count + 1)))
    if c.num_experts and s.mesh.shape["data"] > 1:
        if one.repeated:  # nothing to exchange, outputs are summed
            found.append(Transfer("all-reduce", local, ("data", "model") if s.model > 1 else ("data",), count))
        elif rows := one.sent_rows:
            # There and back; the backward pass sends the rows again, and then their gradients.
            calls = 2 * count * (4 if one.step == "train" else 1)
            found.append(Transfer("ragged-all-to-all", rows * c.hidden_size * 2, ("data",), calls))
        else:
            found += [Transfer(kind, group, ("data",), times * count) for kind in ("all-gather", "reduce-scatter")]
    if s.context_parallel:
        found += _context_transfers(one, layers)
    return found + (_parameter_transfers(one) if one.step == "train" or one.placed.job.fully_sharded else [])


def _context_transfers(one: Pass, layers: dict[str, int]) -> list[Transfer]:
    """What the layers of a cut sequence exchange over `data` (docs/scaling.md, "Bytes"; without the convolution's few tokens)."""
    c, s, ways = one.placed.config, one.placed.sharding, one.placed.sharding.mesh.shape["data"]
    heads, values = (s.heads(n) // s.model for n in (c.num_attention_heads, c.linear_num_value_heads))
    rows = one.placed.rows
    outputs = rows * one.length * heads * c.head_dim * 4
    if one.step == "decode":
        return [Transfer("all-reduce", outputs, ("data",), layers["attention"])]
    state = rows * values * c.linear_key_head_dim * 4
    steps = math.ceil(math.log2(ways))
    sent = state * ((steps - 1) * c.linear_key_head_dim + (steps + 1) * c.linear_value_head_dim)
    times = 3 if one.step == "train" else 1  # forward, again, backward
    found = [Transfer("collective-permute", sent, ("data",), times * layers["gated_deltanet"])]
    if one.step == "prefill":
        final = Transfer("all-reduce", state * c.linear_value_head_dim, ("data",), layers["gated_deltanet"])
        queries = Transfer("all-gather", outputs / 2, ("data",), layers["attention"])
        return [*found, final, queries, Transfer("reduce-scatter", outputs, ("data",), layers["attention"])]
    part = rows * one.length // ways * 2 * (s.heads(c.num_key_value_heads) // s.model) * c.head_dim
    # Keys and values go round twice, then with their float32 gradients.
    ring = 2 * (ways - 1) * 2 * part + ways * (2 + 4) * part
    return [*found, Transfer("collective-permute", ring, ("data",), layers["attention"])]


def _parameter_transfers(one: Pass) -> list[Transfer]:
    """Parameters are gathered in the model's dtype: for inference once, the embedding whole; for the forward and the backward
    pass of training, whose gradients are scattered once."""
    placed = one.placed
    idle = {"prefill": ("mtp", "lm_head"), "decode": ("mtp",), "train": ()}[one.step]
    used = {name: tree for name, tree in placed.params.items() if name not in idle}
    experts = shard_bytes(_experts(used))
    dense = shard_bytes(used) - experts
    shape = placed.sharding.mesh.shape
    parts = [(dense, [a for a in ("replica", "data") if shape[a] > 1]), (experts, ["replica"] if shape["replica"] > 1 else [])]
    kinds = (("all-gather", 2), ("reduce-scatter", 1)) if one.step == "train" else (("all-gather", 1),)
    return [Transfer(kind, size, tuple(axes), n) for size, axes in parts if axes and size for kind, n in kinds]


def vision_ways(placed: Placed) -> int:
    """Over how many devices an image's heads and features are cut."""
    return placed.sharding.model if placed.tower.layout.heads == "N" else 1


def _vision_roofline(placed: Placed, topology: Topology, transfers: list[Transfer] | None) -> Roofline:
    """Of all calls of the tower; an image's patches see one another."""
    v, ways, (_, length, calls) = placed.config.vision, vision_ways(placed), placed.images
    d, merged = v.hidden_size, v.hidden_size * v.spatial_merge_size**2
    seen = min(placed.job.image_tokens, IMAGE) * v.spatial_merge_size**2
    patch = d * v.in_channels * v.temporal_patch_size * v.patch_size**2
    block = (4 * d * d + 2 * d * v.intermediate_size + 2 * seen * d) // ways
    merger = merged * (merged + v.out_hidden_size) // ways
    tokens = length // v.spatial_merge_size**2
    operations = 2 * calls * (length * (patch + v.depth * block) + tokens * merger)
    widths = 6 * d + 2 * (d + v.intermediate_size)  # of a block's products, in and out
    memory = {
        "vision tower": calls * shard_bytes(placed.weights["vision"]),
        "activations": calls * length * v.depth * 2 * widths // ways,
    }
    if transfers is None:
        sums = 2 * v.depth + 1 if ways > 1 else 0
        transfers = [Transfer("all-reduce", length * d * 4, ("model",), sums)] if sums else []
    return Roofline(
        operations,
        memory,
        operations / topology.chip.bf16,
        sum(memory.values()) / topology.chip.hbm_bandwidth,
        interconnect([(t, calls) for t in transfers], placed.sharding.mesh, topology),
        placed.job.batch * placed.job.image_tokens,
        calls,
    )
