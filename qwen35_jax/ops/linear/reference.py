"""The product in float32, the dequantised weight written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.ops.fp8 import Fp8Weight, dequantize


def linear_reference(x: jax.Array, w: jax.Array | Fp8Weight, spec: str) -> jax.Array:
    """einsum(spec, x, w) in float32."""
    w = dequantize(w, jnp.float32) if isinstance(w, Fp8Weight) else w
    return jnp.einsum(spec, x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")
