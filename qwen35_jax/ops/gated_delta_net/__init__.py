"""What lies between the projections and the output norm of a Gated DeltaNet layer, for a few tokens (decode, drafts): the
convolutions of q, k and v, the gates and the gated delta rule, as one op on one layer's decoding state.
"""

from __future__ import annotations

import jax

from qwen35_jax.errors import UserError
from qwen35_jax.ops.gated_delta_net import gpu, tpu, xla
from qwen35_jax.ops.gated_delta_net.xla import convolve, gates
from qwen35_jax.ops.segments import check_implementation

__all__ = ["convolve", "gated_delta_net_step", "gates"]

STEPS = {
    "xla": xla.gated_delta_net_step,
    "pallas_tpu": tpu.gated_delta_net_step,
    "pallas_gpu": gpu.gated_delta_net_step,
}


def gated_delta_net_step(
    x: dict[str, jax.Array],
    w: dict[str, jax.Array],
    state: dict[str, jax.Array],
    slots: jax.Array | None = None,
    *,
    active: jax.Array,
    return_states: bool = False,
    implementation: str | None = None,
) -> tuple:
    """Convolution, gates and recurrence of a few tokens, one at a time, from slots of a state.

    Args:
      x: the projections of the tokens: q, k [B, T, K, Hk], v [B, T, N, Hv], a (decay) and b (beta) [B, T, N], any float dtype.
      w: conv_q, conv_k [K, Hk, W], conv_v [N, Hv, W], A_log, dt_bias [N].
      state: windows conv_q, conv_k [S, W - 1, K, Hk] and conv_v [S, W - 1, N, Hv] of the last raw inputs, oldest first, and
        recurrent [S, N, Hk, Hv] fp32.
      slots: int32 [B], distinct, the slot of each row; None means row i is slot i (B == S).
      active: bool [B, T], the row's real tokens, which come first; the others leave its slot as it is.
      return_states: also return the recurrent state after each token, [B, T, N, Hk, Hv].
      implementation: None (xla), "xla", "pallas_tpu" (one kernel) or "pallas_gpu" (two); the kernels update the rows'
        slots in place where `state` is donated.

    Returns:
      (out [B, T, N, Hv] in v's dtype, the new state) and the recurrent states when asked for. As in prefill the convolutions'
      results are rounded to the dtype of q, k and v; gates and recurrence are computed in fp32.

    Raises:
      UserError: shapes that do not fit together, or an implementation that does not exist.
    """
    check_implementation("gated_delta_net_step", implementation, tuple(STEPS))
    _check_shapes(x, w, state, slots, active)
    return STEPS[implementation or "xla"](x, w, state, slots, active, return_states)


def _check_shapes(x, w, state, slots, active) -> None:
    batch, time = x["q"].shape[:2]
    taps, count = w["conv_q"].shape[-1], state["recurrent"].shape[0]
    expected = {f"conv_{name}": (count, taps - 1, *x[name].shape[2:]) for name in "qkv"}
    expected["recurrent"] = (count, x["v"].shape[2], x["q"].shape[3], x["v"].shape[3])
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise UserError(f"gated_delta_net_step: state {name!r} has shape {state[name].shape}; pass {shape}")
    for name in "qkv":
        if w[f"conv_{name}"].shape != (*x[name].shape[2:], taps):
            shape = (*x[name].shape[2:], taps)
            raise UserError(f"gated_delta_net_step: w 'conv_{name}' has shape {w[f'conv_{name}'].shape}; pass {shape}")
    if (slots is None and count != batch) or (slots is not None and slots.shape != (batch,)):
        raise UserError(f"gated_delta_net_step: {batch} rows on {count} slots; pass slots int32 [{batch}], or one slot per row")
    if active.shape != (batch, time):
        raise UserError(f"gated_delta_net_step: active has shape {active.shape}; pass one bool per token, {(batch, time)}")
