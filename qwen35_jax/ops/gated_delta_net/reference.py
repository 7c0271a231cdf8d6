"""A step of a Gated DeltaNet layer from the references of its parts, in the widest dtype of its inputs (at least fp32)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.ops.causal_conv.reference import causal_conv1d
from qwen35_jax.ops.gated_delta.reference import gated_delta_rule


def gated_delta_net_step(x, w, state, *, active):
    """As `ops.gated_delta_net.gated_delta_net_step` with a slot per row; all comes in the dtype of the computation."""
    dtype = jnp.promote_types(x["v"].dtype, jnp.float32)
    x, w = ({name: a.astype(dtype) for name, a in tree.items()} for tree in (x, w))
    ids = active.astype(jnp.int32)
    mixed, windows = {}, {}
    for name in "qkv":
        conv = f"conv_{name}"
        mixed[name], windows[conv] = causal_conv1d(x[name], w[conv], state=state[conv], segment_ids=ids)
    g = -jnp.exp(w["A_log"]) * jax.nn.softplus(x["a"] + w["dt_bias"])
    beta = jax.nn.sigmoid(x["b"])
    out, recurrent = gated_delta_rule(*mixed.values(), g, beta, initial_state=state["recurrent"], segment_ids=ids)
    return out, windows | {"recurrent": recurrent}
