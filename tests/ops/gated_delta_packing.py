"""Packed documents against each alone, for any form of the gated delta rule."""

from __future__ import annotations

import numpy as np


def check_packed_equals_separate(run, inputs, state, lengths: list[int]) -> None:
    """`run((q, k, v, g, beta, state), segment_ids)` on documents of `lengths` packed in one row, padded to the inputs' time.

    Only the first document begins with `state`; fails unless outputs and the last state equal those of each alone.
    """
    time = inputs[0].shape[1]
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    out, final = run((*inputs, state), np.pad(ids, (0, time - len(ids))).astype(np.int32)[None])
    begin = 0
    for i, length in enumerate(lengths):
        alone = [np.roll(x, -begin, axis=1) for x in inputs]
        ids = (np.arange(time) < length).astype(np.int32)[None]
        out_alone, final_alone = run((*alone, state if i == 0 else np.zeros_like(state)), ids)
        np.testing.assert_allclose(out[:, begin : begin + length], out_alone[:, :length], atol=2e-6)
        begin += length
    np.testing.assert_allclose(final, final_alone, atol=2e-6)
