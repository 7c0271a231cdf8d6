"""Gated DeltaNet: the gated delta rule over a sequence (prefill, training) and over a few tokens (decode).

Per value head, with state S [Hk, Hv]: S <- exp(g) S; u = beta (v - S^T k); S <- S + k u^T; o = S^T q.
(Gated Delta Networks, arXiv 2412.06464.) Value head n reads key head n // (N / K); q is scaled by Hk^-0.5.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen35_jax.errors import UserError
from qwen35_jax.ops.gated_delta import context, gpu, gpu_decode, tpu, tpu_decode, xla
from qwen35_jax.ops.gated_delta.kept import KEPT, OUT
from qwen35_jax.ops.segments import check_implementation, check_segment_ids

__all__ = ["KEPT", "gated_delta_rule", "gated_delta_step"]

RULES = {"xla": xla.gated_delta_rule, "pallas_tpu": tpu.gated_delta_rule, "pallas_gpu": gpu.gated_delta_rule}
STEPS = {
    "xla": xla.gated_delta_step,
    "pallas_tpu": tpu_decode.gated_delta_step,
    "pallas_gpu": gpu_decode.gated_delta_step,
}


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    normalize_qk: bool = True,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence over whole sequences, in chunks.

    Args:
      q, k: [B, T, K, Hk]; v: [B, T, N, Hv], any float dtype. g (log decay, <= 0) and beta: [B, T, N], fp32.
      initial_state: [B, N, Hk, Hv] fp32 or None (zeros); it belongs to the first segment.
      segment_ids: int32 [B, T], non-decreasing over the real tokens; 0 marks padding, which leaves the state as it is.
        The state starts from zero where the id changes.
      normalize_qk: divide q and k by their length (x * rsqrt(sum x^2 + 1e-6)) first.
      implementation: None (xla), "xla", "pallas_tpu" or "pallas_gpu" (Hopper, JAX 0.11 or newer; bf16 q, k and v).
      context_axis: under `shard_map`, the mesh axis over which T is cut; each shard has the next T tokens. initial_state is that
        before the first shard, and final_state that after the last, on all shards.

    Returns:
      out [B, T, N, Hv] in v.dtype and final_state [B, N, Hk, Hv] fp32, that of the last segment. Differentiable in q,
      k, v, g, beta and initial_state. "xla" computes in fp32 whatever the inputs; the kernels round the operands of their
      products to bf16 where q, k and v are bf16, and keep sums, decays and the state in fp32.

    Raises:
      UserError: shapes that do not fit together, or an implementation that does not exist or cannot run them.
    """
    check_implementation("gated_delta_rule", implementation, tuple(RULES))
    _check_shapes("gated_delta_rule", q, k, v, g, beta)
    check_segment_ids("gated_delta_rule", segment_ids, *q.shape[:2])
    expected = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise UserError(f"gated_delta_rule: initial_state is {initial_state.shape}; pass [B, N, Hk, Hv] = {expected}")
    rule = RULES[implementation or "xla"]
    if context_axis is not None:
        exact = implementation in (None, "xla")
        rule = functools.partial(context.gated_delta_rule, rule, axis=context_axis, exact=exact)
    out, final = rule(q, k, v, g, beta, initial_state, segment_ids, normalize_qk)
    return checkpoint_name(out, OUT), final


def gated_delta_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    slots: jax.Array | None = None,
    *,
    active: jax.Array | None = None,
    normalize_qk: bool = True,
    return_states: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Run the recurrence over a few tokens (T = 1: decode; more: drafts), one at a time, from slots of a state.

    Args:
      q, k, v, g, beta: as in gated_delta_rule, with a small T.
      state: [S, N, Hk, Hv] fp32. slots: int32 [B], distinct, the slot of each row; None means row i is slot i (B == S).
      active: bool [B, T]; a token that is not active leaves the state as it is. None: all are.
      return_states: also return the state after each token, [B, T, N, Hk, Hv].
      implementation: None (xla), "xla", "pallas_tpu" or "pallas_gpu"; the kernels update the rows' slots in place where
        `state` is donated.

    Returns:
      (out [B, T, N, Hv] in v.dtype, new state [S, N, Hk, Hv]) and the states when asked for. Computed in fp32.

    Raises:
      UserError: shapes that do not fit together, or an implementation that does not exist.
    """
    check_implementation("gated_delta_step", implementation, tuple(STEPS))
    _check_shapes("gated_delta_step", q, k, v, g, beta)
    batch, time = q.shape[:2]
    expected = (state.shape[0], v.shape[2], q.shape[3], v.shape[3])
    if state.shape != expected:
        raise UserError(f"gated_delta_step: state has shape {state.shape}; pass [S, N, Hk, Hv] = {expected}")
    if (slots is None and state.shape[0] != batch) or (slots is not None and slots.shape != (batch,)):
        raise UserError(f"gated_delta_step: {batch} rows on {expected[0]} slots; pass slots int32 [{batch}], or one slot per row")
    if active is not None and active.shape != (batch, time):
        raise UserError(f"gated_delta_step: active has shape {active.shape}; pass one bool per token, {(batch, time)}")
    step = STEPS[implementation or "xla"]
    return step(q, k, v, g, beta, state, slots, active, normalize_qk, return_states)


def _check_shapes(op: str, q, k, v, g, beta) -> None:
    if q.ndim != 4 or k.shape != q.shape:
        raise UserError(f"{op}: q is {q.shape} and k is {k.shape}; pass two arrays [B, T, K, Hk]")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2]:
        raise UserError(f"{op}: v is {v.shape}; pass [B, T, N, Hv] with B, T = {q.shape[:2]}")
    if v.shape[2] % q.shape[2]:
        raise UserError(f"{op}: {v.shape[2]} value heads on {q.shape[2]} key heads; pass a multiple")
    if g.shape != v.shape[:3] or beta.shape != v.shape[:3]:
        raise UserError(f"{op}: g is {g.shape} and beta is {beta.shape}; pass [B, T, N] = {v.shape[:3]}")
    if q.shape[1] == 0:
        raise UserError(f"{op}: no tokens (T = 0)")
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"{op}: {name} has dtype {x.dtype}; pass a float array")
