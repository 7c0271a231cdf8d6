"""The Pallas kernels of decode compiled for TPUs and GPUs that are not there, at the shapes of published models, 64 slots:
that they fit, that the state stays where it is, how many instruction bundles or registers they take; and attention's kernels.

python -m tests.aot.test_decode_kernels step v5e 35b-a3b
"""

from __future__ import annotations

import functools
import itertools
import json
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
from qwen35_jax.ops.attention import attention, cached_attention
from qwen35_jax.ops.gated_delta_net import gated_delta_net_step
from tests.aot.bundles import DUMP, bundles_of, cycles_where_products_are
from tests.aot.devices import TARGETS, needs_compiler, target_devices
from tests.aot.run import SETTINGS, of_this_jax
from tests.aot.sass import dump_settings, needs_disassembler, read_assembly

SLOTS, TIME, CAPACITY, MIB = 64, 8192, 32768, 2**20

# Bundles of the whole kernel, its convolutions and gates included, per value head and token, a twentieth above what was measured.
STEP = {("v5e", "35b-a3b"): 91, ("tpu7x", "35b-a3b"): 74}
STEP_SLOW = {
    ("v5p", "35b-a3b"): 95,
    ("v6e", "35b-a3b"): 76,
    ("v5e", "0.8b"): 143,
    ("v5p", "0.8b"): 157,
    ("v6e", "0.8b"): 129,
    ("tpu7x", "0.8b"): 127,
    ("v5e", "397b-a17b"): 82,
    ("v5p", "397b-a17b"): 83,
    ("v6e", "397b-a17b"): 68,
    ("tpu7x", "397b-a17b"): 64,
}
# Bundles of cached attention's kernel, a twentieth above what was measured: of 1,024 rows of queries and as many keys, and of a
# token's queries and 2,048 keys.
CACHED = {("v5e", "prefill"): 10440, ("tpu7x", "token"): 906}
CACHED_SLOW = {
    ("v5p", "prefill"): 10700,
    ("v6e", "prefill"): 5475,
    ("tpu7x", "prefill"): 5955,
    ("v5e", "token"): 1115,
    ("v5p", "token"): 1201,
    ("v6e", "token"): 957,
}
HOPPER = [
    pytest.param(target, preset, marks=() if (target, preset) == ("h100", "35b-a3b") else pytest.mark.slow)
    for target in ("h100", "h200")
    for preset in ("0.8b", "35b-a3b", "397b-a17b")
]
# MiB of temporaries of attention's forward and backward pass over 8,192 tokens, a tenth above what was measured: with jax 0.10.2,
# and with 0.12.0.1, whose compiler lays out the gradient that comes in before the forward pass begins.
ATTENTION_SLOW = {("v5e", "35b-a3b"): (153, 312), ("tpu7x", "0.8b"): (182,)}


def _arrays(mesh):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, jax.P()))

    return array


def compile_step(mesh, config: ModelConfig, form: str = "pallas_tpu"):
    """The decode step of one layer on one device, its state donated."""
    keys, heads, width = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_key_head_dim
    array, parts, taps = _arrays(mesh), {"q": keys, "k": keys, "v": heads}, config.linear_conv_kernel_dim
    x = {name: array(SLOTS, 1, n, width) for name, n in parts.items()} | {name: array(SLOTS, 1, heads) for name in "ab"}
    w = {f"conv_{name}": array(n, width, taps) for name, n in parts.items()}
    w |= {"A_log": array(heads, dtype=jnp.float32), "dt_bias": array(heads)}
    state = {f"conv_{name}": array(SLOTS, taps - 1, n, width) for name, n in parts.items()}
    state["recurrent"] = array(SLOTS, heads, width, width, dtype=jnp.float32)
    active = array(SLOTS, 1, dtype=jnp.bool_)

    def step(x, w, state, active):
        return gated_delta_net_step(x, w, state, active=active, implementation=form)

    return _local(step, mesh, donate_argnums=2).lower(x, w, state, active).compile()


def compile_attention(mesh, config: ModelConfig):
    """Both passes of one row of packed documents."""
    array, heads, width = _arrays(mesh), config.num_attention_heads, config.head_dim
    q, k = array(1, TIME, heads, width), array(1, TIME, config.num_key_value_heads, width)

    def passes(q, k, v, ids, cotangent):
        out, back = jax.vjp(functools.partial(attention, segment_ids=ids, implementation="pallas_tpu"), q, k, v)
        return out, back(cotangent)

    return _local(passes, mesh).lower(q, k, k, array(1, TIME, dtype=jnp.int32), q).compile()


def compile_cached(mesh, config: ModelConfig, rows: int, time: int, form: str = "pallas_tpu"):
    """New tokens of `rows` slots that attend to a cache, donated."""
    array, groups, width = _arrays(mesh), config.num_key_value_heads, config.head_dim
    q, k = array(rows, time, config.num_attention_heads, width), array(rows, time, groups, width)
    cache, numbers = array(rows, groups, CAPACITY, width), array(rows, dtype=jnp.int32)

    def step(q, k, v, cache_k, cache_v, start, count):
        return cached_attention(q, k, v, cache_k, cache_v, start=start, count=count, implementation=form)

    return _local(step, mesh, donate_argnums=(3, 4)).lower(q, k, k, cache, cache, numbers, numbers).compile()


COMPILE = {
    "step": compile_step,
    "hopper step": functools.partial(compile_step, form="pallas_gpu"),
    "attention": compile_attention,
    "prefill": functools.partial(compile_cached, rows=1, time=2048),
    "token": functools.partial(compile_cached, rows=SLOTS, time=1),
    "hopper prefill": functools.partial(compile_cached, rows=1, time=2048, form="pallas_gpu"),
    "hopper token": functools.partial(compile_cached, rows=SLOTS, time=1, form="pallas_gpu"),
    "hopper lone token": functools.partial(compile_cached, rows=1, time=1, form="pallas_gpu"),
    "prefill by xla": functools.partial(compile_cached, rows=1, time=2048, form="xla"),
}
KERNEL = {"step": "gated_delta_net_step", "prefill": "cached_attention", "token": "cached_attention"}


def _local(function, mesh, **options):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False), **options)


def compile_here(what: str, target: str, preset: str) -> dict:
    """Bytes of temporaries, and of results that take an argument's place; of XLA's prefill the cycles of a block of scores."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=target_devices(target)[:1])
    compiled = COMPILE[what](mesh, ModelConfig.preset(preset))
    memory = compiled.memory_analysis()
    result = {"temporary": memory.temp_size_in_bytes, "in_place": memory.alias_size_in_bytes}
    return result | ({"cycles": cycles_where_products_are(compiled.as_text())} if what == "prefill by xla" else {})


def compile_elsewhere(what: str, target: str, preset: str) -> dict:
    """`compile_here` in a process of its own, with the kernel's bundles on TPU, its registers and spilled bytes on GPU."""
    needs_compiler(target)
    on_gpu = TARGETS[target].platform == "cuda"
    if on_gpu:
        needs_disassembler()
    with tempfile.TemporaryDirectory() as dump:
        settings = SETTINGS | {"LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {DUMP.format(dump)}"}
        settings |= dump_settings(dump) if on_gpu else {}
        command = [sys.executable, "-m", "tests.aot.test_decode_kernels", what, target, preset]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, env=os.environ | settings, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{target} {preset} did not compile:\n{done.stderr[-4000:]}"
        kernels = list(itertools.chain(*read_assembly(dump).values()))
        return json.loads(done.stdout.splitlines()[-1]) | {
            "bundles": bundles_of(Path(dump), KERNEL[what]) if what in KERNEL else None,
            "registers": [kernel.registers for kernel in kernels],
            "spilled": sum(kernel.spilled for kernel in kernels),
            "warnings": [line for kernel in kernels for line in kernel.warnings],
        }


def _cases(default, slow):
    for cases, marks in ((default, ()), (slow, pytest.mark.slow)):
        yield from (pytest.param(*case, ceiling, id="-".join(case), marks=marks) for case, ceiling in cases.items())


@pytest.mark.parametrize(("target", "preset", "ceiling"), list(_cases(STEP, STEP_SLOW)))
def test_step(target, preset, ceiling):
    config, result = ModelConfig.preset(preset), compile_elsewhere("step", target, preset)
    heads, width = config.linear_num_value_heads, config.linear_value_head_dim
    each = result["bundles"] / min(heads, 32)
    print(target, preset, result, each)
    # The state is updated in place and nothing of its size is made beside it.
    state = SLOTS * heads * width * width * 4
    assert result["in_place"] > state and result["temporary"] < state / 64
    assert each <= ceiling


@pytest.mark.parametrize(("target", "what", "ceiling"), list(_cases(CACHED, CACHED_SLOW)))
def test_cached_attention(target, what, ceiling):
    """The caches are updated in place. Beside them are queries in blocks, 16 MiB of a prefill, or nothing; with the newest libtpu
    for v5p outputs in blocks too, where a copy of a prefill's keys would be 32 MiB more."""
    rows, time = (1, 2048) if what == "prefill" else (SLOTS, 1)
    result = compile_elsewhere(what, target, "35b-a3b")
    print(target, what, result)
    assert result["in_place"] == 2 * rows * 2 * CAPACITY * 256 * 2
    arrays = 2 if target == "v5p" and jax.__version_info__ >= (0, 11) else 1
    assert result["temporary"] < arrays * rows * time * 16 * 256 * 2 + MIB
    assert result["bundles"] <= ceiling


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e", "v6e", "tpu7x"])
def test_cached_attention_takes_fewer_cycles_than_the_compiler_estimates_of_xla(target):
    """A block of XLA's form, 256 tokens of 16 heads and 512 keys, is as many scores as two of the kernel."""
    cycles = compile_elsewhere("prefill by xla", target, "35b-a3b")["cycles"]
    print(target, cycles)
    assert cycles > 2 * (CACHED | CACHED_SLOW)[target, "prefill"]


@pytest.mark.skipif(not HAS_MOSAIC_GPU, reason="Pallas Mosaic GPU kernels need JAX 0.11 or newer")
@pytest.mark.parametrize(("target", "preset"), HOPPER)
def test_step_for_hopper(target, preset):
    """Two kernels, of which nothing spills. A thread holds 64 numbers of the state; two blocks leave each thread room for 255.
    State and windows are updated in place; beside them is what the first kernel makes for the second."""
    result = compile_elsewhere("hopper step", target, preset)
    print(target, preset, result)
    heads = ModelConfig.preset(preset).linear_num_value_heads
    assert result["in_place"] >= SLOTS * (heads * 128 * 128 * 4 + 3 * (heads + 2 * 16) * 128 * 2)
    assert result["temporary"] < 2 * SLOTS * heads * 4 * 128 * 4
    assert result["spilled"] == 0 and not result["warnings"]
    assert len(result["registers"]) == 2 and max(result["registers"]) <= 152


@pytest.mark.skipif(not HAS_MOSAIC_GPU, reason="Pallas Mosaic GPU kernels need JAX 0.11 or newer")
@pytest.mark.parametrize("what", ["prefill", "token", "lone token"])
@pytest.mark.parametrize(("target", "preset"), HOPPER)
def test_cached_attention_for_hopper(target, preset, what):
    """Nothing spills; two warpgroups of a thread block, or a block alone on its multiprocessor, leave each thread room for 255
    registers. The caches are updated in place; beside them are queries in blocks of 64 rows, and outputs in blocks; where several
    blocks share the keys of one token, 64 of them, float32."""
    config, (rows, time) = ModelConfig.preset(preset), {"prefill": (1, 2048), "token": (SLOTS, 1), "lone token": (1, 1)}[what]
    result = compile_elsewhere(f"hopper {what}", target, preset)
    print(target, preset, what, result)
    assert result["in_place"] == 2 * rows * config.num_key_value_heads * CAPACITY * config.head_dim * 2
    padded = rows * time * config.num_attention_heads if what == "prefill" else SLOTS * config.num_key_value_heads * 64
    assert result["temporary"] < 2 * padded * config.head_dim * 2 + MIB
    assert result["spilled"] == 0 and not result["warnings"]
    assert result["registers"] and max(result["registers"]) <= 248


@pytest.mark.parametrize(("target", "preset", "ceiling"), list(_cases({}, ATTENTION_SLOW)))
def test_attention(target, preset, ceiling):
    result = compile_elsewhere("attention", target, preset)
    print(target, preset, result)
    assert result["temporary"] <= of_this_jax(ceiling) * MIB


if __name__ == "__main__":
    print(json.dumps(compile_here(*sys.argv[1:])))
