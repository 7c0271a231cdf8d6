"""Names of what the gated delta rule keeps for its gradient, and of its result: for rematerialisation policies."""

from __future__ import annotations

OUT = "gated_delta_out"
STATES = "gated_delta_states"  # before each chunk
INVERSE = "gated_delta_inverse"  # of each chunk's triangular system
UPDATES = "gated_delta_updates"  # its solution; the XLA form computes it again
KEPT = (OUT, STATES, INVERSE, UPDATES)
