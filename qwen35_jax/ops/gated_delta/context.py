"""The gated delta rule on sequences cut over a mesh axis, by any of its forms on each shard's tokens.

A shard's tokens are an affine map of the state that enters them, S' = A S + B, and so is what each of them puts out,
o = E S + o0: B and o0 are what the rule gives from a state of zeros, A and E what it gives from the identity when nothing is
written (v = 0), since columns of S never mix. So each shard runs the rule twice at once, waiting for nobody, the maps of all
shards are composed in log2(shards) steps, and one product puts the state that really enters into the outputs.

The rule costs about twice what it does alone. Running it once more from the true state instead of the product would cost a third
pass, after the exchange; a scan over the shards would leave all but one idle. Letters: h, x key width, v value width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen35_jax.ops.segments import entering_segment, first_segment, from_shard, shift_right


def gated_delta_rule(rule: Callable, q, k, v, g, beta, initial_state, segment_ids, normalize_qk, *, axis: str, exact: bool):
    """See `ops.gated_delta.gated_delta_rule` with a context_axis. `rule` is a form of it; `exact`: products of its results are
    of float32 operands, else rounded to v's dtype as the kernels round theirs."""
    out, final = rule(q, k, v, g, beta, None, segment_ids, normalize_qk)
    width, heads = k.shape[-1], v.shape[2]
    unit = jnp.broadcast_to(jnp.eye(width, dtype=jnp.float32), (k.shape[0], heads, width, width))
    nothing = jnp.zeros((*v.shape[:3], width), v.dtype)
    reach, transition = rule(q, k, nothing, g, beta, unit, segment_ids, normalize_qk)
    if segment_ids is not None:
        goes_on = _goes_on(segment_ids, axis)[:, None, None, None]
        transition = jnp.where(goes_on, transition, 0)
    if initial_state is not None:
        initial_state = jnp.where(jax.lax.axis_index(axis) == 0, initial_state, 0).astype(jnp.float32)
        final += _product(transition, initial_state)
    final = _composed(transition, final, axis)
    entering = shift_right(final, axis)
    if initial_state is not None:
        entering += initial_state
    if segment_ids is not None:
        entering = jnp.where(goes_on, entering, 0)
    if not exact:
        reach, entering = reach.astype(v.dtype), entering.astype(v.dtype)
    out = (out + _einsum("bthx,bhxv->bthv", reach, entering)).astype(v.dtype)
    return out, from_shard(final, axis, jax.lax.axis_size(axis) - 1)


def _goes_on(segment_ids, axis: str):
    """Whether the first document of this shard is the one that the shards before end with: bool [B]."""
    before, first = entering_segment(segment_ids, axis), first_segment(segment_ids)
    return (before == 0) | (first == 0) | (before == first)


def _composed(transition, final, axis: str):
    """The state behind each shard, from its own map and those of all shards before (a scan of Hillis and Steele).

    Shards that have nothing before them receive zeros: the map that forgets what came in, which there is none of.
    """
    step, count = 1, jax.lax.axis_size(axis)
    while step < count:
        before, state = shift_right((transition, final), axis, step)
        transition, final = _product(transition, before), _product(transition, state) + final
        step *= 2
    return final


def _product(transition, state):
    return _einsum("bnhx,bnxv->bnhv", transition, state)


def _einsum(spec: str, x, y):
    precision = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    return jnp.einsum(spec, x.astype(y.dtype), y, precision=precision, preferred_element_type=jnp.float32)
