"""What differs between the JAX versions that the project runs on. Nothing else asks for a version."""

from __future__ import annotations

import jax

# Pallas' Mosaic GPU backend changed its interface in 0.11; the kernels are written for the newer one.
HAS_MOSAIC_GPU = jax.__version_info__ >= (0, 11)
