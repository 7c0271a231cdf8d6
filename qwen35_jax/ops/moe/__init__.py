"""Mixture of experts: routing, and `moe_apply`, which brings tokens and experts together across the mesh."""

from __future__ import annotations

import functools
import math

import jax

from qwen35_jax.ops.moe.all_to_all import all_to_all_experts
from qwen35_jax.ops.moe.choice import MOE_CHOICES, moe_form, tokens_are_cut
from qwen35_jax.ops.moe.gather import gather_experts
from qwen35_jax.ops.moe.reference import moe_reference
from qwen35_jax.ops.moe.routing import RouterLoad, Routing, balance_loss, route
from qwen35_jax.sharding import Sharding

__all__ = [
    "EXPERT_AXES",
    "MOE_CHOICES",
    "RouterLoad",
    "Routing",
    "balance_loss",
    "moe_apply",
    "moe_form",
    "moe_reference",
    "route",
]

EXPERT_AXES = {"gate": "E D F", "up": "E D F", "down": "E F D"}


def moe_apply(
    x, routing: Routing, experts: dict, sharding: Sharding, form: str = "gather", *, implementation=None, fp8_activations=False
):
    """Sum over each token's experts of weight x down(silu(gate) * up). Drops nothing; differentiable.

    x [B, T, D]; routing [B, T, k]; experts {"gate", "up": [E, D, F], "down": [E, F, D]}, arrays or Fp8Weight -> [B, T, D] in
    x.dtype. `form`: "gather" (all-gather, local grouped products, reduce-scatter), "all_to_all" (rows to their experts' devices
    and back) or "auto", see `moe_form`. `fp8_activations`: products of `Fp8Weight`s take their activations in FP8 too.
    """
    shapes = {name: [a.shape for a in jax.tree.leaves(w)] for name, w in experts.items()}
    specs = {name: sharding.parameter_spec(axes, *shapes[name]) for name, axes in EXPERT_AXES.items()}
    expert_axes, f_axes = sharding.expert_axes(*(dict(zip(EXPERT_AXES["gate"].split(), s, strict=True)) for s in shapes["gate"]))
    tokens = sharding.spec("B T D")
    cut = tokens_are_cut(sharding)
    count, k = math.prod(x.shape[:2]), routing.experts.shape[-1]
    form = moe_form(form, sharding, count, shapes["gate"][0][0], k, x.shape[2], x.dtype.itemsize, fp8_activations)
    local = functools.partial(
        functools.partial(gather_experts, gathered=cut) if form == "gather" else all_to_all_experts,
        expert_axes=expert_axes,
        # Partial over `model` where it cuts E or F; where it cuts neither, every model shard has the whole sum. Partial over
        # `data` where every data shard has all tokens already: what is gathered is scattered again.
        partial_axes=tuple(a for a in (*expert_axes, *f_axes) if a != "data" or not cut),
        implementation=implementation,
        fp8_activations=fp8_activations,
    )
    mapped = jax.shard_map(local, mesh=sharding.mesh, in_specs=(tokens, tokens, specs), out_specs=tokens, check_vma=False)
    return mapped(x, routing, experts)
