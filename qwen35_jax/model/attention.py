"""Gated attention: grouped queries, normed queries and keys, partial rotary embedding, a sigmoid gate on the output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from qwen35_jax.config import ModelConfig
from qwen35_jax.model.inputs import Inputs, StackedState
from qwen35_jax.model.params import declare
from qwen35_jax.model.products import Products
from qwen35_jax.ops.attention import ShardedCache, attention, cached_attention
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.norm import rms_norm
from qwen35_jax.ops.rotary import apply_rotary
from qwen35_jax.sharding import Sharding

CACHE_AXES = {"k": "S K P H", "v": "S K P H"}
STACK_AXES = StackedState({name: f"U {axes}" for name, axes in CACHE_AXES.items()}, "")


class GatedAttention(nnx.Module):
    """One full-attention mixer. Keys and values have num_key_value_heads (K) heads; the query projection also makes the gate."""

    def __init__(self, config: ModelConfig, sharding: Sharding, forms: Forms):
        d, n, k, h = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_gate = declare(config, "D N G H", (d, n, 2, h), fp8=True)
        self.k = declare(config, "D K H", (d, k, h), fp8=True)
        self.v = declare(config, "D K H", (d, k, h), fp8=True)
        self.q_norm = declare(config, "H", (h,), "zeros")
        self.k_norm = declare(config, "H", (h,), "zeros")
        self.out = declare(config, "N H D", (n, h, d), fp8=True)
        self.eps, self.sharding, self.forms = config.rms_norm_eps, sharding, forms
        self.multiply = Products(config, sharding, forms)

    def steps_in_stack(self, x: jax.Array) -> bool:
        """As of `GatedDeltaNet`, whatever the number of tokens."""
        return self.forms.cached_attention != "xla"

    @jax.named_scope("gated_attention")
    def __call__(self, x: jax.Array, inputs: Inputs, cache: dict | StackedState | None = None):
        """x [B, T, D] -> ([B, T, D], the unit's cache with the new keys and values, as it came)."""
        s, multiply = self.sharding, self.multiply
        x = multiply.share(x, self.q_gate.get_value(), self.k.get_value(), self.v.get_value())
        q_gate = multiply(x, s.repeat_heads(self.q_gate.get_value(), "D N G H", "N"), "BTD,DNGH->BTNGH")
        q, gate = q_gate[..., 0, :], q_gate[..., 1, :]
        k = multiply(x, s.repeat_heads(self.k.get_value(), "D K H", "K"), "BTD,DKH->BTKH")
        v = multiply(x, s.repeat_heads(self.v.get_value(), "D K H", "K"), "BTD,DKH->BTKH")
        q = apply_rotary(rms_norm(q, self.q_norm.get_value(), self.eps), inputs.cos, inputs.sin)
        k = apply_rotary(rms_norm(k, self.k_norm.get_value(), self.eps), inputs.cos, inputs.sin)
        if cache is None:
            y = self._attend(q, k, v, inputs)
        else:
            y, cache = self._attend_cached(q, k, v, inputs, cache)
        y = s.constrain(y * jax.nn.sigmoid(gate), "B T N H")
        out = s.repeat_heads(self.out.get_value(), "N H D", "N", once=True)
        return s.constrain(multiply(y, out, "BTNH,NHD->BTD"), "B T D"), cache

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs) -> jax.Array:
        options = {"implementation": self.forms.attention, "context_axis": self.sharding.context_axis}

        def local(q, k, v, segment_ids):
            return attention(q, k, v, segment_ids=segment_ids, **options)

        heads = ("B T N H", "B T K H", "B T K H", "B T")
        return self.sharding.shard_map(local, heads, "B T N H")(q, k, v, inputs.segment_ids)

    def _attend_cached(self, q, k, v, inputs: Inputs, cache: dict | StackedState):
        layout, axes = None, self.sharding.rules["P"]
        if axes:
            layout = ShardedCache(*axes, inputs.chunk // self.sharding.size("P"), self.sharding.context_axis is not None)

        stacked = isinstance(cache, StackedState)

        def local(q, k, v, cache, slots, start, count):
            held, slots = cache.joined(1, slots) if stacked else (cache, slots)
            out, new_k, new_v = cached_attention(
                q, k, v, held["k"], held["v"],
                slots=slots, start=start, count=count, implementation=self.forms.cached_attention, layout=layout,
            )  # fmt: skip
            new = {"k": new_k, "v": new_v}
            return out, cache.updated(new) if stacked else new

        count = jnp.sum(inputs.segment_ids > 0, axis=1, dtype=jnp.int32)
        cache_axes = STACK_AXES if stacked else CACHE_AXES
        axes = ("B T N H", "B T K H", "B T K H", cache_axes, None if inputs.slots is None else "B", "B", "B")
        mapped = self.sharding.shard_map(local, axes, ("B T N H", cache_axes))
        return mapped(q, k, v, cache, inputs.slots, inputs.start, count)
