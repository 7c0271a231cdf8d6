"""What differs between the JAX versions that the project runs on. Nothing else asks for a version."""

from __future__ import annotations

import jax
from jax._src import distributed

# Pallas' Mosaic GPU backend changed its interface in 0.11; the kernels are written for the newer one.
HAS_MOSAIC_GPU = jax.__version_info__ >= (0, 11)


def coordinator_host() -> str:
    """Where the other hosts reach the first one, also where JAX found it. JAX has no public name for it."""
    return distributed.global_state.coordinator_address.rpartition(":")[0].strip("[]")


def store_anyhow(ref, value: jax.Array) -> None:
    """Mosaic GPU: writes registers to memory in an order that need not suit it. Before 0.12 every plain store does."""
    if jax.__version_info__ < (0, 12):
        ref[...] = value
        return
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.store(ref, value, optimized=False)
