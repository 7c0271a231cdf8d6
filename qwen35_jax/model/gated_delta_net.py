"""Gated DeltaNet: linear attention whose state is a matrix, decayed, corrected by the delta rule and read every token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from qwen35_jax.config import ModelConfig
from qwen35_jax.model.inputs import Inputs
from qwen35_jax.model.params import declare
from qwen35_jax.model.products import Products
from qwen35_jax.ops.causal_conv import causal_conv1d
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.gated_delta import gated_delta_rule, gated_delta_step
from qwen35_jax.ops.norm import gated_rms_norm
from qwen35_jax.sharding import Sharding

STATE_AXES = {"conv_q": "S W K H", "conv_k": "S W K H", "conv_v": "S W N H", "recurrent": "S N H H"}
WEIGHT_AXES = {"conv_q": "K H W", "conv_k": "K H W", "conv_v": "N H W", "A_log": "N", "dt_bias": "N"}


class GatedDeltaNet(nnx.Module):
    """One linear-attention mixer: linear_num_key_heads (K) heads of q and k serve linear_num_value_heads (N) heads of v."""

    def __init__(self, config: ModelConfig, sharding: Sharding, forms: Forms):
        d, k, n = config.hidden_size, config.linear_num_key_heads, config.linear_num_value_heads
        hk, hv, width = config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim
        self.q = declare(config, "D K H", (d, k, hk), fp8=True)
        self.k = declare(config, "D K H", (d, k, hk), fp8=True)
        self.v = declare(config, "D N H", (d, n, hv), fp8=True)
        self.z = declare(config, "D N H", (d, n, hv), fp8=True)
        self.b = declare(config, "D N", (d, n))
        self.a = declare(config, "D N", (d, n))
        self.conv_q = declare(config, "K H W", (k, hk, width))
        self.conv_k = declare(config, "K H W", (k, hk, width))
        self.conv_v = declare(config, "N H W", (n, hv, width))
        self.A_log = declare(config, "N", (n,), "a_log", dtype="float32")
        self.dt_bias = declare(config, "N", (n,), "ones")
        self.norm = declare(config, "H", (hv,), "ones", dtype="float32")
        self.out = declare(config, "N H D", (n, hv, d), fp8=True)
        self.eps, self.sharding, self.forms = config.rms_norm_eps, sharding, forms
        self.multiply = Products(config, sharding, forms)

    @jax.named_scope("gated_delta_net")
    def __call__(self, x: jax.Array, inputs: Inputs, state: dict | None = None) -> tuple[jax.Array, dict | None]:
        """x [B, T, D] -> ([B, T, D], the layer's windows and recurrent state after the last real token)."""
        x = self.multiply.share(x, *(w.get_value() for w in (self.q, self.k, self.v, self.z)))
        project = {
            "q": self._project(x, self.q, "D K H"),
            "k": self._project(x, self.k, "D K H"),
            "v": self._project(x, self.v, "D N H"),
            "a": self._project(x, self.a, "D N"),
            "b": self._project(x, self.b, "D N"),
        }
        weights = {name: self.sharding.repeat_heads(getattr(self, name).get_value(), a, a[0]) for name, a in WEIGHT_AXES.items()}
        axes = {"q": "B T K H", "k": "B T K H", "v": "B T N H", "a": "B T N", "b": "B T N"}
        slots = None if inputs.slots is None else "B"
        state_axes = None if state is None else STATE_AXES
        mapped = self.sharding.shard_map(self._mix, (axes, WEIGHT_AXES, "B T", slots, state_axes), ("B T N H", state_axes))
        o, state = mapped(project, weights, inputs.segment_ids, inputs.slots, state)
        y = gated_rms_norm(o, self._project(x, self.z, "D N H"), self.norm.get_value(), self.eps)
        out = self.sharding.repeat_heads(self.out.get_value(), "N H D", "N", once=True)
        y = self.multiply(self.sharding.constrain(y, "B T N H"), out, "BTNH,NHD->BTD")
        return self.sharding.constrain(y, "B T D"), state

    def _project(self, x: jax.Array, weight: nnx.Param, axes: str) -> jax.Array:
        letters = axes.replace(" ", "")
        weight = self.sharding.repeat_heads(weight.get_value(), axes, letters[1])
        return self.multiply(x, weight, f"BTD,{letters}->BT{letters[1:]}")

    def _mix(self, x: dict, w: dict, segment_ids: jax.Array, slots: jax.Array | None, state: dict | None):
        """Convolution, gates and recurrence on one device's heads and rows."""
        rows = state if state is None or slots is None else {name: s[slots] for name, s in state.items()}
        mixed, windows = self._convolve(x, w, segment_ids, rows)
        # float32 from here: rounding the decay or beta drifts with the length of the context.
        decay = -jnp.exp(w["A_log"]) * jax.nn.softplus(x["a"].astype(jnp.float32) + w["dt_bias"].astype(jnp.float32))
        beta = jax.nn.sigmoid(x["b"].astype(jnp.float32))
        q, k, v = mixed
        if rows is not None and q.shape[1] == 1:
            out, recurrent = gated_delta_step(
                q, k, v, decay, beta, rows["recurrent"], active=segment_ids > 0, implementation=self.forms.gated_delta_step
            )
        else:
            out, recurrent = gated_delta_rule(
                q, k, v, decay, beta,
                initial_state=None if rows is None else rows["recurrent"],
                segment_ids=segment_ids, implementation=self.forms.gated_delta_rule,
            )  # fmt: skip
        if state is None:
            return out, None
        new = {**windows, "recurrent": recurrent}
        return out, new if slots is None else {name: s.at[slots].set(new[name]) for name, s in state.items()}

    def _convolve(self, x: dict, w: dict, segment_ids: jax.Array, rows: dict | None):
        """q, k and v after their convolutions, in one call over all channels, and their new windows."""
        names = ("conv_q", "conv_k", "conv_v")
        parts = [x["q"], x["k"], x["v"]]
        sizes = [p.shape[2] * p.shape[3] for p in parts]
        flat = jnp.concatenate([p.reshape(*p.shape[:2], -1) for p in parts], axis=-1)
        weight = jnp.concatenate([w[n].reshape(-1, w[n].shape[-1]) for n in names])
        state = None
        if rows is not None:
            state = jnp.concatenate([rows[n].reshape(*rows[n].shape[:2], -1) for n in names], axis=-1)
        y, window = causal_conv1d(flat, weight, state=state, segment_ids=segment_ids, implementation=self.forms.causal_conv1d)

        def split(a):
            ends = [sum(sizes[: i + 1]) for i in range(2)]
            return [s.reshape(*a.shape[:2], *p.shape[2:]) for s, p in zip(jnp.split(a, ends, axis=-1), parts, strict=True)]

        return split(y), dict(zip(names, split(window), strict=True))
