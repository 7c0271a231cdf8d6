"""What was aimed at for the kernels on an H200 before they were written, and how much of it a measurement reaches: 1 is all."""

from __future__ import annotations

# Milliseconds: pass, sequences, tokens of each, key heads, value heads. Two numbers are a first and a second aim.
RULE = {("forward", 4, 8192, 16, 64): (1.2, 0.83), ("backward", 1, 32768, 16, 32): (2.5,)}
DECODE, SLOTS = 0.8, 64  # of the bandwidth of a copy, from so many sequences on
# TFLOP/s with both operands in FP8: rows, outs, ins, groups.
PRODUCTS = {
    (4096, 7168, 16384, 1): (1200, 1400),
    (4 * 8192, 4096, 7168, 4): (1000,),
    (4 * 8192, 7168, 2048, 4): (1000,),
}


def of_rule(kind: str, case: tuple, milliseconds: float) -> str:
    """Shares of the aims for a pass of the gated delta rule on a device of this kind; empty where there are none."""
    return _shares(kind, [aim / milliseconds for aim in RULE.get(case, ())])


def of_decode(kind: str, slots: int, of_copy: float) -> str:
    """The same of a decode step that reaches this share of a copy's bandwidth."""
    return _shares(kind, [of_copy / DECODE] if slots >= SLOTS else [])


def of_product(kind: str, case: tuple, rate: float) -> str:
    """The same of a product at this rate in TFLOP/s."""
    return _shares(kind, [rate / aim for aim in PRODUCTS.get(case, ())])


def _shares(kind: str, shares: list[float]) -> str:
    return ", ".join(f"{share:.2f}" for share in shares) if "H200" in kind else ""
