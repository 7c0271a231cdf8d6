"""The Hopper kernels of the gated delta rule compiled at the shapes of published models, 8,192 tokens in bfloat16: no register
spills, matrix products on the tensor cores that are not made to wait for each other, shared memory that fits.

python -m tests.aot.test_gated_delta_gpu h200 35b-a3b
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.config import ModelConfig
from qwen35_jax.ops.gated_delta import gated_delta_rule
from tests.aot.devices import needs_compiler, target_devices
from tests.aot.run import GPU_SETTINGS, SETTINGS
from tests.aot.sass import dump_settings, needs_disassembler, read_assembly

TIME = 8192
BARRIERS = 128  # bytes beside what is counted
SHARED_BYTES = 227 * 1024  # of a thread block on Hopper
# Three blocks of `chunks` share a multiprocessor: its 65,536 registers, and 228 KiB of which each takes one for itself. Of the
# others one does, with 255 registers a thread: what takes nearly all of them spills with the next assembler.
MOST_REGISTERS, MOST_SHARED = {"chunks": 168, "forward": 252, "reverse": 248}, {"chunks": 228 * 1024 // 3 - 1024}
KERNELS = {"chunks", "forward", "reverse", "gradients"}
CASES = [
    pytest.param(target, preset, marks=() if (target, preset) == ("h200", "35b-a3b") else pytest.mark.slow)
    for target in ("h100", "h200")
    for preset in ("0.8b", "35b-a3b", "397b-a17b")
]


def _rule(*inputs):
    *inputs, state = inputs
    return gated_delta_rule(*inputs, initial_state=state, implementation="pallas_gpu")


def _gradient(inputs, cotangents):
    values, vjp = jax.vjp(_rule, *inputs)
    return values, vjp(cotangents)


def compile_kernels(target: str, preset: str) -> None:
    """Compiles both passes for one device."""
    config = ModelConfig.preset(preset)
    keys, heads, width = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_key_head_dim
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=target_devices(target)[:1])

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, jax.P()))

    q, v = (array(1, TIME, n, width, dtype=jnp.bfloat16) for n in (keys, heads))
    gate, state = array(1, TIME, heads), array(1, heads, width, width)
    inputs = q, q, v, gate, gate, state
    for function, arguments in ((_rule, inputs), (_gradient, (inputs, (v, state)))):
        local = jax.shard_map(function, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
        jax.jit(local).lower(*arguments).compile()


@pytest.mark.skipif(not HAS_MOSAIC_GPU, reason="Pallas Mosaic GPU kernels need JAX 0.11 or newer")
@pytest.mark.parametrize(("target", "preset"), CASES)
def test_gated_delta_kernels(target, preset, tmp_path):
    needs_compiler(target)
    needs_disassembler()
    command = [sys.executable, "-m", "tests.aot.test_gated_delta_gpu", target, preset]
    environment = os.environ | SETTINGS | GPU_SETTINGS | dump_settings(tmp_path)
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{target} {preset} did not compile:\n{done.stderr[-4000:]}"
    found = {name.removeprefix("gated_delta_"): kernels for name, kernels in read_assembly(tmp_path).items()}
    assert set(found) == KERNELS and len(found["forward"]) == 2, found  # forward: one that saves for the gradient, one not
    for name, kernels in found.items():
        for kernel in kernels:
            hgmma = kernel.instructions.get("HGMMA", 0)
            count = sum(kernel.instructions.values())
            print(f"{target} {preset} {name}: {kernel.registers} registers, {kernel.spilled} bytes spilled, "
                  f"{count} instructions, {hgmma} HGMMA")  # fmt: skip
            assert kernel.spilled == 0 and hgmma > 0 and not kernel.warnings, (name, kernel)
            assert kernel.registers <= MOST_REGISTERS.get(name, 255), (name, kernel)
    for path in tmp_path.glob("*.resources.txt"):
        shared = int(re.search(r"smem_scratch_bytes=(\d+)", path.read_text())[1])
        most = next((n for name, n in MOST_SHARED.items() if name in path.name), SHARED_BYTES - 2048)
        assert 0 < shared + BARRIERS <= most, path.read_text()


if __name__ == "__main__":
    compile_kernels(*sys.argv[1:])
