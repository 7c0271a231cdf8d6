"""The Hopper kernels of `linear` and `grouped_linear` compiled at the shapes of published models, 8,192 tokens: that nothing is
spilled, and that FP8 is multiplied by the tensor cores' FP8 instructions.

python -m tests.aot.test_gpu_kernels_fp8 h200 35b-a3b
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.config import ModelConfig
from qwen35_jax.ops.fp8 import Fp8Operand, Fp8Weight, quantize_activation, quantize_weight
from qwen35_jax.ops.grouped_linear import grouped_linear
from qwen35_jax.ops.hopper.rows import rows_times
from qwen35_jax.ops.linear import linear
from tests.aot.devices import needs_compiler, target_devices
from tests.aot.run import GPU_SETTINGS, SETTINGS
from tests.aot.sass import dump_settings, needs_disassembler, read_assembly

TOKENS, FEW = 8192, 8
ODD = 70  # no multiple of 8, at which alone a copy of rows can begin
FP8 = {"fp8_rows", "fp8_gradients"}  # on FP8 tensor cores; all others on those for bfloat16
OPENED = {"dequantized_rows", "upcast_rows"}
MOST_REGISTERS = 168  # a thread: three warpgroups fill a multiprocessor's 65,536
KERNELS = {"dense": FP8 | OPENED, "experts": FP8 | OPENED | {"rows", "gradients"}}
DEFAULT = [("h200", "35b-a3b")]
SLOW = [("h100", "35b-a3b"), ("h100", "0.8b"), ("h200", "0.8b"), ("h100", "397b-a17b"), ("h200", "397b-a17b")]


def _both(f, dy, *args):
    y, back = jax.vjp(f, *args)
    return y, back(dy)


def _in_pairs(x, w):
    """Both in FP8, by thread blocks that share their copies of x."""
    x, w = quantize_activation(x), quantize_weight(w, (0, 1))
    return rows_times(x.values, w.values.T[None], jnp.full(1, TOKENS, jnp.int32), transposed=True, x_scales=x.scales,
                      w_scales=w.scales[None].astype(jnp.float32), out_dtype=jnp.bfloat16, pairs=True)  # fmt: skip


def dense_products(config: ModelConfig, array):
    """Of one width in, one out: training, and FP8 weights with activations in FP8 and in bfloat16, of many and of few tokens."""
    spec, ins = "TD,DF->TF", config.hidden_size
    outs = config.moe_intermediate_size if config.num_experts else config.intermediate_size
    w = Fp8Weight(array(ins, outs, dtype=jnp.float8_e4m3fn), array(ins // 128, outs // 128))

    def multiply(x, w):
        return linear(x, w, spec, implementation="pallas_gpu")

    x, dy = array(TOKENS, ins), array(TOKENS, outs)
    yield lambda dy, x, w: _both(lambda x, w: multiply(x, Fp8Operand(w)), dy, x, w), (dy, x, array(ins, outs, dtype=jnp.float32))
    if outs % 256 == 0:
        yield _in_pairs, (array(TOKENS, ins), array(ins, outs))
    for tokens in (TOKENS, ODD, FEW):
        x = array(tokens, ins)
        yield lambda x, w: multiply(quantize_activation(x), w), (x, w)
        yield multiply, (x, w)


def expert_products(config: ModelConfig, array):
    """The same of one device's share of the experts over eight, and in bfloat16 with gradients."""
    groups, ins, outs = config.num_experts // 8, config.hidden_size, config.moe_intermediate_size
    w = Fp8Weight(array(groups, ins, outs, dtype=jnp.float8_e4m3fn), array(groups, ins // 128, outs // 128))
    sizes, plain = array(groups, dtype=jnp.int32), array(groups, ins, outs)

    def multiply(x, w, sizes):
        return grouped_linear(x, w, sizes, implementation="pallas_gpu")

    for rows in (TOKENS * config.num_experts_per_tok, FEW * config.num_experts_per_tok):
        x, dy = array(rows, ins), array(rows, outs)
        for operand, kept in ((Fp8Operand, jnp.float32), (lambda w: w, jnp.bfloat16)):
            yield (
                lambda dy, x, w, sizes, operand=operand: _both(lambda x, w: multiply(x, operand(w), sizes), dy, x, w),
                (dy, x, array(*plain.shape, dtype=kept), sizes),
            )
        yield lambda x, w, sizes: multiply(quantize_activation(x), w, sizes), (x, w, sizes)
        yield multiply, (x, w, sizes)


def compile_products(target: str, preset: str) -> None:
    config = ModelConfig.preset(preset)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=target_devices(target)[:1])

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, jax.P()))

    for products in (dense_products, *((expert_products,) if config.num_experts else ())):
        for function, arguments in products(config, array):
            local = jax.shard_map(function, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
            jax.jit(local).lower(*arguments).compile()


def compile_elsewhere(target: str, preset: str) -> dict:
    """`compile_products` in a process of its own: the assembly of its kernels."""
    with tempfile.TemporaryDirectory() as dump:
        command = [sys.executable, "-m", "tests.aot.test_gpu_kernels_fp8", target, preset]
        environment, root = os.environ | SETTINGS | GPU_SETTINGS | dump_settings(dump), Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{target} {preset} did not compile:\n{done.stderr[-4000:]}"
        return read_assembly(dump)


def _cases():
    for cases, marks in ((DEFAULT, ()), (SLOW, pytest.mark.slow)):
        yield from (pytest.param(*case, id="-".join(case), marks=marks) for case in cases)


@pytest.mark.skipif(not HAS_MOSAIC_GPU, reason="Pallas Mosaic GPU kernels need JAX 0.11 or newer")
@pytest.mark.parametrize(("target", "preset"), list(_cases()))
def test_products_for_hopper(target, preset):
    needs_compiler(target)
    needs_disassembler()
    kernels = compile_elsewhere(target, preset)
    print(target, preset, {name: [(a.registers, a.spilled) for a in found] for name, found in kernels.items()})
    assert [kernel.instructions["MULTICAST"] for kernel in kernels["fp8_rows"]].count(1) == 1  # x, of the blocks in pairs
    assert set(kernels) == KERNELS["experts" if ModelConfig.preset(preset).num_experts else "dense"]
    for name, found in kernels.items():
        for kernel in found:
            assert kernel.spilled == 0 and kernel.registers <= MOST_REGISTERS and not kernel.warnings, (name, kernel)
            assert (kernel.instructions.get("QGMMA", 0) > 0) == (name in FP8), (name, kernel)
            assert (kernel.instructions.get("HGMMA", 0) > 0) == (name not in FP8), (name, kernel)


if __name__ == "__main__":
    compile_products(*sys.argv[1:])
