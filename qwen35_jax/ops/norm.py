"""Root-mean-square norms, and LayerNorm. Statistics in fp32, one rounding at the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x, weight, eps: float = 1e-6, offset: float = 1.0):
    """RMSNorm over the last axis: x [..., D], weight [D] -> [..., D] in x.dtype.

    The published scales are stored as offsets from one (hence `offset`): y = x * rsqrt(mean(x^2) + eps) * (offset + w).
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * (offset + weight.astype(jnp.float32))).astype(x.dtype)


def layer_norm(x, weight, bias, eps: float = 1e-6):
    """LayerNorm over the last axis: x [..., D], weight and bias [D] -> [..., D] in x.dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * scale * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


@jax.checkpoint
def gated_rms_norm(o, z, weight, eps: float = 1e-6):
    """RMSNorm of o, then times silu(z): o, z [..., H], weight [H] -> [..., H] in o.dtype.

    The weight is plain (no offset). The normalised value is rounded to the activation dtype before the weight is applied, as
    the published model does; the gate is applied in fp32. The backward pass keeps the arguments alone.
    """
    o32 = o.astype(jnp.float32)
    normed = o32 * jax.lax.rsqrt(jnp.mean(jnp.square(o32), axis=-1, keepdims=True) + eps)
    normed = (weight.astype(jnp.float32) * normed.astype(o.dtype).astype(jnp.float32)).astype(o.dtype)
    return (normed.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))).astype(o.dtype)
