"""The two feed-forward blocks: dense SwiGLU, and routed experts beside a shared one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from qwen35_jax.config import ModelConfig
from qwen35_jax.model.inputs import Inputs
from qwen35_jax.model.params import declare
from qwen35_jax.model.products import Products
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.moe import EXPERT_AXES, RouterLoad, Routing, moe_apply, route
from qwen35_jax.sharding import Sharding


class DenseMlp(nnx.Module):
    """down(silu(gate(x)) * up(x)) of width F."""

    def __init__(self, config: ModelConfig, width: int, sharding: Sharding, forms: Forms):
        d = config.hidden_size
        self.gate = declare(config, "D F", (d, width), fp8=True)
        self.up = declare(config, "D F", (d, width), fp8=True)
        self.down = declare(config, "F D", (width, d), fp8=True)
        self.sharding, self.multiply = sharding, Products(config, sharding, forms)

    @jax.named_scope("dense_mlp")
    def __call__(self, x: jax.Array, inputs: Inputs) -> tuple[jax.Array, None]:
        """x [B, T, D] -> ([B, T, D], no router's load)."""
        x = self.multiply.share(x, self.gate.get_value(), self.up.get_value())
        gate, up = (self.multiply(x, w.get_value(), "BTD,DF->BTF") for w in (self.gate, self.up))
        hidden = self.sharding.constrain(jax.nn.silu(gate) * up, "B T F")
        return self.sharding.constrain(self.multiply(hidden, self.down.get_value(), "BTF,FD->BTD"), "B T D"), None


class Experts(nnx.Module):
    """The weights of the routed experts."""

    def __init__(self, config: ModelConfig):
        e, d, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate = declare(config, "E D F", (e, d, f), fp8=True)
        self.up = declare(config, "E D F", (e, d, f), fp8=True)
        self.down = declare(config, "E F D", (e, f, d), fp8=True)


class MoeMlp(nnx.Module):
    """Top-k routed experts plus a shared expert behind a sigmoid gate, one scalar a token."""

    def __init__(self, config: ModelConfig, sharding: Sharding, forms: Forms):
        # "X": the router's columns are experts too, but every device needs all of them.
        self.router = declare(config, "D X", (config.hidden_size, config.num_experts))
        self.experts = Experts(config)
        self.shared = DenseMlp(config, config.shared_expert_intermediate_size, sharding, forms)
        self.shared_gate = declare(config, "D", (config.hidden_size,))
        self.top_k, self.sharding, self.moe = config.num_experts_per_tok, sharding, forms.moe
        self.multiply, self.fp8_activations = Products(config, sharding, forms), config.fp8_activations
        self.grouped = forms.fp8_grouped_linear if config.fp8_weights else forms.grouped_linear

    @jax.named_scope("moe_mlp")
    def __call__(self, x: jax.Array, inputs: Inputs) -> tuple[jax.Array, RouterLoad]:
        """x [B, T, D] -> ([B, T, D], the load [E] of its experts); padding is routed nowhere."""
        logits = self.multiply(x, self.router.get_value(), "BTD,DX->BTX", jnp.float32)
        # Left to the partitioner, the top k of some backends gathers the logits of all tokens first.
        mapped = self.sharding.shard_map(self._route, ("B T X", "B T"), ("B T X", "J X"))
        routing, load = mapped(logits, inputs.segment_ids > 0)
        experts = {name: getattr(self.experts, name).get_value() for name in EXPERT_AXES}
        options = {"implementation": self.grouped, "fp8_activations": self.fp8_activations}
        routed = moe_apply(x, routing, experts, self.sharding, self.moe, **options)
        gate = self.multiply(x, self.shared_gate.get_value(), "BTD,D->BT", jnp.float32)
        shared, _ = self.shared(x, inputs)
        y = self.sharding.constrain(routed + (jax.nn.sigmoid(gate)[..., None] * shared).astype(x.dtype), "B T D")
        return y, jax.tree.map(lambda shards: jnp.sum(shards, axis=0), load)

    def _route(self, logits: jax.Array, alive: jax.Array) -> tuple[Routing, RouterLoad]:
        return route(logits, self.top_k, alive)


def make_mlp(config: ModelConfig, sharding: Sharding, forms: Forms) -> nnx.Module:
    """The block that this model has in every layer."""
    if config.num_experts:
        return MoeMlp(config, sharding, forms)
    return DenseMlp(config, config.intermediate_size, sharding, forms)
