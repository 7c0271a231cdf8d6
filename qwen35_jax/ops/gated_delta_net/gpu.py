"""A step of a Gated DeltaNet layer for Hopper, in two kernels: what the recurrence needs of each token, and the recurrence.

A thread block of the first one takes a slot's key head with its value heads: convolutions, norms and q.k, one number of a head
a thread. No two of them share a channel, so windows are moved on in place; the recurrence has several blocks a head and cannot.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.ops.gated_delta.gpu_decode import ALONG, BETA, DECAY, KEY, KEYS, QUERY, SCALARS, SUMS, VALUES, advance
from qwen35_jax.ops.gated_delta_net import xla

ONE_EACH = plgpu.Layout.WG_STRIDED((KEYS,), 1)  # a number of a head a thread


def supports(key_width: int, value_width: int) -> bool:
    """Whether heads of these widths have the first kernel."""
    return key_width == KEYS and value_width % KEYS == 0


def gated_delta_net_step(x, w, state, slots, active, return_states):
    """See `ops.gated_delta_net.gated_delta_net_step`. Other widths have XLA's convolutions, an older JAX no kernels."""
    (batch, time, _, key_width), value_width = x["q"].shape, x["v"].shape[3]
    if not (HAS_MOSAIC_GPU and supports(key_width, value_width)):
        return xla.gated_delta_net_step(x, w, state, slots, active, return_states, recurrence="pallas_gpu")
    slots = jnp.arange(batch, dtype=jnp.int32) if slots is None else slots
    decay, beta = (jnp.where(active[..., None], g, 0) for g in xla.gates(x, w))
    gates = jnp.stack([jnp.exp(decay), beta], axis=-1)
    taps = [jnp.moveaxis(w[name], -1, 0) for name in xla.WINDOWS]
    heads = x["v"].shape[2]
    windows = [jax.new_ref(state[name]) for name in xla.WINDOWS]
    vectors = plgpu.kernel(
        _vectors_kernel,
        out_type=jax.ShapeDtypeStruct((batch, time, heads, VALUES + value_width // KEYS, KEYS), jnp.float32),
        grid=(x["q"].shape[2], batch),
        grid_names=("head", "row"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=SUMS),
        kernel_name="gated_delta_vectors",
    )(slots, active.astype(jnp.int32), x["q"], x["k"], x["v"], gates, *taps, *windows)
    out, recurrent, *states = advance(slots, vectors, state["recurrent"], return_states)
    new = {name: jax.freeze(window) for name, window in zip(xla.WINDOWS, windows, strict=True)}
    return out.astype(x["v"].dtype), {**new, "recurrent": recurrent}, *states


def _vectors_kernel(slots, active, q, k, v, gates, q_taps, k_taps, v_taps, q_window, k_window, v_window, vectors):
    """In memory: q, k [B, T, K, KEYS], v [B, T, N, Hv], gates [B, T, N, 2] fp32 (e^g and beta); of each taps [W, heads, width]
    and windows [S, W - 1, heads, width]; vectors as `gpu_decode.advance` takes them."""
    row, j = lax.axis_index("row"), lax.axis_index("head")
    slot, time, group = slots[row], q.shape[1], v.shape[2] // q.shape[2]
    real = [active[row, t] != 0 for t in range(time)]
    lane = plgpu.broadcasted_iota(jnp.int32, (KEYS,), 0, layout=ONE_EACH)

    def convolved(x, taps, window, head, part=0):
        return _convolved(x.at[row, :, head], taps.at[:, head], window.at[slot, :, head], real, part)

    keys = [_unit(y) for y in convolved(k, k_taps, k_window, j)]
    queries = [_unit(y) * KEYS**-0.5 for y in convolved(q, q_taps, q_window, j)]
    along = [jnp.sum(a * b) for a, b in zip(keys, queries, strict=True)]
    for i in range(group):
        n = j * group + i
        for t in range(time):
            rows = vectors.at[row, t, n]
            scalars = {DECAY: gates[row, t, n, 0], BETA: gates[row, t, n, 1], ALONG: along[t]}
            rows[KEY], rows[QUERY] = keys[t], queries[t]
            rows[SCALARS] = sum(jnp.where(lane == place, x, 0.0) for place, x in scalars.items())
        for part in range(v.shape[3] // KEYS):
            for t, y in enumerate(convolved(v, v_taps, v_window, n, part)):
                vectors.at[row, t, n][VALUES + part] = y


def _convolved(x, taps, window, real: list, part: int) -> list[jax.Array]:
    """silu of the convolution of each token of x [T, width], rounded to its dtype as the convolution alone would; the window
    [W - 1, width] is moved on by the real ones. Of KEYS channels, the part-th."""
    channels = pl.ds(part * KEYS, KEYS)

    def load(ref, i):
        return plgpu.load(ref.at[i, channels], layout=ONE_EACH, optimized=False).astype(jnp.float32)

    past, results = [load(window, i) for i in range(window.shape[0])], []
    weights = [load(taps, i) for i in range(taps.shape[0])]
    for t, on in enumerate(real):
        seen = [*past, load(x, t)]
        y = sum(a * b for a, b in zip(seen, weights, strict=True))
        results.append((y * jax.nn.sigmoid(y)).astype(x.dtype).astype(jnp.float32))
        past = [jnp.where(on, new, old) for new, old in zip(seen[1:], past, strict=True)]
    for i, value in enumerate(past):
        window.at[i, channels][...] = value.astype(window.dtype)
    return results


def _unit(x: jax.Array) -> jax.Array:
    """As `xla.unit_length` of the gated delta rule."""
    return x * lax.rsqrt(jnp.sum(x * x) + 1e-6)
