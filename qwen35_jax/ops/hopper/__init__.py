"""Matrix products for Hopper (H100, H200) in Pallas Mosaic GPU, bfloat16 and FP8, for `linear` and `grouped_linear`."""

from __future__ import annotations
