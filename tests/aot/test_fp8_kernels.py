"""The TPU kernels of FP8 products compiled for each generation at the shapes of published models: that they fit into VMEM, how
many instruction bundles a tile takes, and that no wider copy of the weight is made.

python -m tests.aot.test_fp8_kernels v5e 35b-a3b
python -m tests.aot.test_fp8_kernels v5e 35b-a3b xla training
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from qwen35_jax.config import ModelConfig
from qwen35_jax.ops.fp8 import BLOCK, Fp8Activation, Fp8Operand, Fp8Weight
from qwen35_jax.ops.fp8.tpu import make_tile
from qwen35_jax.ops.grouped_linear import grouped_linear
from qwen35_jax.ops.linear import linear
from tests.aot import bundles
from tests.aot.devices import needs_compiler

TOKENS, FEW = 8192, 32  # of prefill and of a decode step
SHARDS = 8  # devices that the experts are spread over
VARIANTS = ("many_rows", "activations", "few_rows")
KERNELS = tuple(f"fp8_{op}_{variant}" for op in ("linear", "grouped") for variant in VARIANTS)

# Bundles of each of KERNELS (dense models have the first three), for 512 rows x 512 columns x 512 terms, a twentieth above
# what was measured with libtpu 0.0.42.
CEILINGS = {
    ("tpu7x", "35b-a3b"): (801, 1456, 321, 869, 1578, 364),
}
SLOW = {
    ("v5e", "35b-a3b"): (2829, 2445, 667, 2875, 2544, 734),
    ("v6e", "35b-a3b"): (1590, 1476, 691, 1606, 1613, 763),
    ("tpu7x", "397b-a17b"): (801, 1456, 321, 878, 1585, 439),
    ("v5e", "0.8b"): (2527, 2224, 620),
    ("tpu7x", "0.8b"): (599, 1327, 271),
    ("v6e", "0.8b"): (1338, 1334, 638),
    ("v5p", "0.8b"): (2564, 2266, 655),
    ("v5p", "35b-a3b"): (2861, 2491, 701, 2903, 2575, 761),
    ("v5e", "397b-a17b"): (2829, 2445, 667, 2976, 2557, 822),
    ("v5p", "397b-a17b"): (2861, 2491, 701, 2995, 2582, 827),
    ("v6e", "397b-a17b"): (1590, 1476, 691, 1617, 1625, 819),
}


def shapes(preset: str) -> dict[str, tuple[int, ...]]:
    """The weight of the product of each op: of z in Gated DeltaNet, or of a dense gate; one device's share of the experts."""
    c = ModelConfig.preset(preset)
    if not c.num_experts:
        return {"linear": (c.hidden_size, c.intermediate_size)}
    wide = c.linear_num_value_heads * c.linear_value_head_dim
    return {"linear": (c.hidden_size, wide), "grouped": (c.num_experts // SHARDS, c.hidden_size, c.moe_intermediate_size)}


def rows_of(op: str, variant: str, preset: str) -> int:
    tokens = FEW if variant == "few_rows" else TOKENS
    return tokens * ModelConfig.preset(preset).num_experts_per_tok // SHARDS if op == "grouped" else tokens


def compile_kernels(target: str, preset: str, implementation: str = "pallas_tpu") -> dict[str, float]:
    """Compiles every variant for one device; MiB of temporaries of each, its weight's bytes in FP8 and MiB."""
    mesh, array = bundles.one_device(target)
    found = {}
    for op, shape in shapes(preset).items():
        *experts, terms, columns = shape
        w = Fp8Weight(
            array(*shape, dtype=jnp.float8_e4m3fn), array(*experts, terms // BLOCK, columns // BLOCK, dtype=jnp.bfloat16)
        )
        for variant in VARIANTS:
            rows = rows_of(op, variant, preset)
            x = array(rows, terms, dtype=jnp.bfloat16)
            if variant == "activations":
                x = Fp8Activation(x, array(rows, terms, dtype=jnp.float8_e4m3fn), array(rows, terms // BLOCK))
            if op == "linear":
                compiled = bundles.compile_on(mesh, lambda x, w: linear(x, w, "TD,DF->TF", implementation=implementation), (x, w))
            else:
                sizes = array(*experts, dtype=jnp.int32)
                run = lambda x, w, sizes: grouped_linear(x, w, sizes, implementation=implementation)  # noqa: E731
                compiled = bundles.compile_on(mesh, run, (x, w, sizes))
            found[f"fp8_{op}_{variant}"] = round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1)
    return found


def compile_training(target: str, preset: str, implementation: str = "pallas_tpu") -> dict[str, float]:
    """The dense product of FP8 training and its gradients on one device: MiB of temporaries, and by the compiler's estimate the
    cycles of what is no kernel, for each 512 x 512 x 512 of each of the three products."""
    mesh, array = bundles.one_device(target)
    terms, columns = shapes(preset)["linear"]

    def both(x, w, dy):
        y, back = jax.vjp(lambda x, w: linear(x, Fp8Operand(w), "TD,DF->TF", implementation=implementation), x, w)
        return y, back(dy)

    x, dy = (array(TOKENS, width, dtype=jnp.bfloat16) for width in (terms, columns))
    compiled = bundles.compile_on(mesh, both, (x, array(terms, columns), dy))
    cubes = 3 * TOKENS * terms * columns / 512**3
    temporary = round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1)
    return {"temporary": temporary, "cycles": round(bundles.estimated_cycles(compiled.as_text()) / cubes)}


def per_cube(preset: str, kernel: str, total: int) -> int:
    """Bundles of the whole kernel (one grid step, with everything it does once a tile) for 512 rows x 512 columns x 512 terms;
    few rows count as they are."""
    _, op, variant = kernel.split("_", 2)
    *_, terms, columns = shapes(preset)[op]
    tile = make_tile(rows_of(op, variant, preset), terms, columns, 2 if variant == "many_rows" else 0)
    rows = 512 if variant == "few_rows" else tile.rows
    return round(total / (rows * tile.columns * tile.terms / 512**3))


def measure(target: str, preset: str) -> tuple[dict[str, float], dict[str, int]]:
    temporaries, found = bundles.compile_elsewhere("tests.aot.test_fp8_kernels", target, preset, kernels=KERNELS)
    return temporaries, {kernel: per_cube(preset, kernel, n) for kernel, n in found.items()}


def _cases():
    for cases, marks in ((CEILINGS, ()), (SLOW, pytest.mark.slow)):
        yield from (pytest.param(*case, ceilings, id="-".join(case), marks=marks) for case, ceilings in cases.items())


@pytest.mark.parametrize(("target", "preset", "ceilings"), list(_cases()))
def test_fp8_kernels(target, preset, ceilings):
    needs_compiler(target)
    temporaries, found = measure(target, preset)
    print(target, preset, temporaries, found)
    assert temporaries.keys() == found.keys() == {kernel for kernel in KERNELS if kernel.split("_")[1] in shapes(preset)}
    # MiB: no copy of the weight, the smallest of which has 3.5, in 397b-a17b 32.
    assert max(temporaries.values()) < 1, temporaries
    assert all(found[kernel] <= ceiling for kernel, ceiling in zip(KERNELS, ceilings, strict=False) if kernel in found), found


if __name__ == "__main__":
    compile_one = compile_training if sys.argv[4:] == ["training"] else compile_kernels
    print(json.dumps(compile_one(*sys.argv[1:4])))
