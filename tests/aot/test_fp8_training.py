"""FP8 training compiled for the H200 and for tpu7x, which multiply FP8: that the optimised programs do, and what they exchange.

python -m tests.aot.test_fp8_training h200 linear
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.config import ModelConfig
from qwen35_jax.model.products import Products
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.fp8 import Fp8Operand
from qwen35_jax.ops.grouped_linear import grouped_linear
from qwen35_jax.planner import hlo
from qwen35_jax.sharding import Sharding, make_mesh
from tests.aot.devices import needs_compiler, target_devices
from tests.aot.run import SETTINGS

B, T, D, F, E = 8, 512, 1024, 2048, 8
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)")


def fp8_products(text: str) -> list[str]:
    """The kinds of the instructions of optimised HLO that multiply two FP8 operands."""
    types, found = {}, []
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            name, kind_of, op, operands = match.groups()
            types[name] = kind_of
            operands = [types.get(o, "") for o in re.findall(r"%([\w.\-]+)", operands)]
            if op in ("dot", "convolution", "custom-call") and sum(t.startswith("f8e4m3fn[") for t in operands) >= 2:
                found.append(op)
    return found


def compile_linear(devices, form="xla"):
    """A pair of linears whose middle is cut over `model`, its forward and backward pass on a mesh of 2 x 4."""
    sharding = Sharding(make_mesh("2x4", devices))
    multiply, cuts = Products(ModelConfig.preset("0.8b"), sharding, Forms(fp8_training_linear=form)), (("B", 2), ("F", 4))

    def pair(x, up, down):
        return multiply(multiply(x, Fp8Operand(up, cuts), "BTD,DF->BTF"), Fp8Operand(down, cuts), "BTF,FD->BTD")

    def place(shape, axes, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(sharding.mesh, sharding.spec(axes)))

    x = place((B, T, D), "B T D", jnp.bfloat16)
    args = x, place((D, F), "D F", jnp.float32), place((F, D), "F D", jnp.float32)
    places = tuple(a.sharding for a in args)
    return jax.jit(functools.partial(_both, pair), out_shardings=(x.sharding, places)).lower(x, *args).compile()


def _both(f, dy, *args):
    y, back = jax.vjp(f, *args)
    return y, back(dy)


def compile_grouped(devices):
    """Forward and backward pass of one device's experts."""

    def run(dy, x, w, group_sizes):
        return _both(lambda x, w: grouped_linear(x, Fp8Operand(w), group_sizes), dy, x, w)

    place = SingleDeviceSharding(devices[0])
    shapes = [((B * T, F), jnp.bfloat16), ((B * T, D), jnp.bfloat16), ((E, D, F), jnp.float32), ((E,), jnp.int32)]
    return jax.jit(run).lower(*(jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes)).compile()


COMPILE = {"linear": compile_linear, "grouped": compile_grouped}
COMPILE |= {f"{form} kernels": functools.partial(compile_linear, form=form) for form in ("pallas_tpu", "pallas_gpu")}
hopper = pytest.mark.skipif(not HAS_MOSAIC_GPU, reason="Pallas Mosaic GPU kernels need JAX 0.11 or newer")


@pytest.mark.parametrize(
    ("target", "op"),
    [
        *itertools.product(["h200", "tpu7x"], ["linear", "grouped"]),
        ("tpu7x", "pallas_tpu kernels"),
        *(pytest.param(target, "pallas_tpu kernels", marks=pytest.mark.slow) for target in ("v5e", "v5p", "v6e")),
        pytest.param("h200", "pallas_gpu kernels", marks=hopper),
        pytest.param("h100", "pallas_gpu kernels", marks=[hopper, pytest.mark.slow]),
    ],
)
def test_multiplies_in_fp8(target, op):
    """The kernels of linears run on each device's shard, with the exchanges of the partitioned form."""
    needs_compiler(target)
    command = [sys.executable, "-m", "tests.aot.test_fp8_training", target, op]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | SETTINGS, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(target, op, result)
    assert len(result["fp8"]) >= {"grouped": 3}.get(op, 6), result  # each weight: forward, dx, dw
    # The pair's output and the gradient of x over `model`, the weights' gradients over `data`: sums, and no operand of a product.
    assert {kind for kind, _ in result["collectives"]} <= {"all-reduce", "reduce-scatter"}, result
    assert sum(size for _, size in result["collectives"]) <= 2 * (B * T * D // 2 + D * F // 4) * 4, result


if __name__ == "__main__":
    compiled = COMPILE[sys.argv[2]](target_devices(sys.argv[1]))
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(compiled.as_text())
    exchanged = [[c.kind, c.bytes] for c in hlo.collectives(compiled.as_text())]
    memory = compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps({"fp8": fp8_products(compiled.as_text()), "collectives": exchanged, "temporary_bytes": memory}))
