"""Gated DeltaNet: linear attention whose state is a matrix, decayed, corrected by the delta rule and read every token."""

from __future__ import annotations

import jax
from flax import nnx

from qwen35_jax.config import ModelConfig
from qwen35_jax.model.inputs import Inputs, StackedState
from qwen35_jax.model.params import declare
from qwen35_jax.model.products import Products
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.gated_delta import gated_delta_rule
from qwen35_jax.ops.gated_delta_net import convolve, gated_delta_net_step, gates
from qwen35_jax.ops.norm import gated_rms_norm
from qwen35_jax.sharding import Sharding

STATE_AXES = {"conv_q": "S W K H", "conv_k": "S W K H", "conv_v": "S W N H", "recurrent": "S N H H"}
STACK_AXES = StackedState({name: f"U L {axes}" for name, axes in STATE_AXES.items()}, "")
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

    def steps_in_stack(self, x: jax.Array) -> bool:
        """Whether the layer takes its state for x [B, T, D] in the stack of all layers': its kernel finds it there by index,
        where XLA copies a stack that it does not slice."""
        return x.shape[1] == 1 and self.forms.gated_delta_step != "xla"

    @jax.named_scope("gated_delta_net")
    def __call__(self, x: jax.Array, inputs: Inputs, state: dict | StackedState | None = None):
        """x [B, T, D] -> ([B, T, D], the layer's windows and recurrent state after the last real token, as they came)."""
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
        if isinstance(state, StackedState):
            mix, state_axes = self._step_in_stack, STACK_AXES
        else:
            mix, state_axes = self._mix, None if state is None else STATE_AXES
        mapped = self.sharding.shard_map(mix, (axes, WEIGHT_AXES, "B T", slots, state_axes), ("B T N H", state_axes))
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
        axis = self.sharding.context_axis
        if state is not None and x["q"].shape[1] == 1 and axis is None:
            form = self.forms.gated_delta_step
            return gated_delta_net_step(x, w, state, slots, active=segment_ids > 0, implementation=form)
        rows = state if state is None or slots is None else {name: s[slots] for name, s in state.items()}
        (q, k, v), windows = convolve(x, w, segment_ids, rows, self.forms.causal_conv1d, axis)
        decay, beta = gates(x, w)
        out, recurrent = gated_delta_rule(
            q, k, v, decay, beta,
            initial_state=None if rows is None else rows["recurrent"],
            segment_ids=segment_ids, implementation=self.forms.gated_delta_rule, context_axis=axis,
        )  # fmt: skip
        if state is None:
            return out, None
        new = {**windows, "recurrent": recurrent}
        return out, new if slots is None else {name: s.at[slots].set(new[name]) for name, s in state.items()}

    def _step_in_stack(self, x: dict, w: dict, segment_ids: jax.Array, slots: jax.Array | None, state: StackedState):
        """As `_mix`, of one token: [U, L, S, ...] is [U L S, ...], in which the layer's slots are one after the other."""
        flat, slots = state.joined(2, slots)
        form = self.forms.gated_delta_step
        out, flat = gated_delta_net_step(x, w, flat, slots, active=segment_ids > 0, implementation=form)
        return out, state.updated(flat)
