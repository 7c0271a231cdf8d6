"""The Pallas kernels for TPU compiled for each generation at the shapes of published models, 8,192 tokens in bfloat16: that
the compiler accepts them, that they fit into VMEM, and how many instruction bundles a step takes.

python -m tests.aot.test_kernels v5e 35b-a3b
"""

from __future__ import annotations

import json
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from qwen35_jax.config import ModelConfig
from qwen35_jax.ops.gated_delta import gated_delta_rule
from qwen35_jax.ops.gated_delta.tpu import HEADS
from qwen35_jax.ops.gated_delta.tpu_kernels import CHUNK
from tests.aot import bundles
from tests.aot.devices import needs_compiler

TIME = 8192
KERNELS = {  # names in the compiler's dumps, and which of HEADS
    "forward": ("gated_delta_forward_kernel", 0),
    "saving": ("jvp_gated_delta_forward_kernel", 0),
    "backward": ("transpose_jvp_gated_delta_backward_kernel", 1),
}

# Bundles of the whole kernel per value head and 64 tokens, a twentieth above what was measured with libtpu 0.0.42: forward,
# forward that saves for the gradient, backward.
CEILINGS = {
    ("v5e", "35b-a3b"): (378, 384, 508),
    ("tpu7x", "35b-a3b"): (294, 299, 385),
}
SLOW = {
    ("v5p", "35b-a3b"): (372, 388, 524),
    ("v6e", "35b-a3b"): (297, 301, 360),
    ("v5e", "0.8b"): (417, 424, 590),
    ("v5p", "0.8b"): (418, 434, 594),
    ("v6e", "0.8b"): (309, 314, 443),
    ("tpu7x", "0.8b"): (310, 318, 429),
    ("v5e", "397b-a17b"): (354, 354, 466),
    ("v5p", "397b-a17b"): (357, 362, 478),
    ("v6e", "397b-a17b"): (272, 277, 344),
    ("tpu7x", "397b-a17b"): (270, 275, 368),
}


def _rule(*inputs):
    *inputs, state = inputs
    return gated_delta_rule(*inputs, initial_state=state, implementation="pallas_tpu")


def _gradient(inputs, cotangents):
    return jax.vjp(_rule, *inputs)[1](cotangents)


def compile_kernels(target: str, preset: str) -> float:
    """Compiles both passes for one device; seconds."""
    config = ModelConfig.preset(preset)
    keys, heads, width = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_key_head_dim
    mesh, array = bundles.one_device(target)
    q, v = (array(1, TIME, n, width, dtype=jnp.bfloat16) for n in (keys, heads))
    gate, state = array(1, TIME, heads), array(1, heads, width, width)
    inputs, begin = (q, q, v, gate, gate, state), time.perf_counter()
    for function, arguments in ((_rule, inputs), (_gradient, (inputs, (v, state)))):
        bundles.compile_on(mesh, function, arguments)
    return time.perf_counter() - begin


def compile_elsewhere(target: str, preset: str) -> dict:
    """The seconds of `compile_kernels`, and the bundles per value head and 64 tokens of each kernel."""
    config = ModelConfig.preset(preset)
    group = config.linear_num_value_heads // config.linear_num_key_heads
    names = {kernel: (name, HEADS["bfloat16"][which]) for name, (kernel, which) in KERNELS.items()}
    seconds, found = bundles.compile_elsewhere("tests.aot.test_kernels", target, preset, kernels=tuple(names))
    result = {"seconds": seconds}
    for kernel, total in found.items():
        name, most = names[kernel]
        heads = min(most // group * group, config.linear_num_value_heads)
        result[name] = round(total / (heads * CHUNK / 64))
    return result


def _cases():
    for cases, marks in ((CEILINGS, ()), (SLOW, pytest.mark.slow)):
        yield from (pytest.param(*case, ceilings, id="-".join(case), marks=marks) for case, ceilings in cases.items())


@pytest.mark.parametrize(("target", "preset", "ceilings"), list(_cases()))
def test_gated_delta_kernels(target, preset, ceilings):
    needs_compiler(target)
    result = compile_elsewhere(target, preset)
    print(target, preset, result)
    for name, ceiling in zip(KERNELS, ceilings, strict=True):
        assert result[name] <= ceiling, result


def test_the_last_schedule_of_a_kernel_counts(tmp_path):
    """File names begin with the time; the system lists them in any order."""
    for began, count in ((1795874781, 7), (1795874761, 3), (1795874780, 5)):
        schedule = tmp_path / f"{began}-some_kernel.1-71-schedule-analysis_final_bundles.txt"
        schedule.write_text(f"total scheduled bundles: {count}\n")
    assert bundles.bundles_of(tmp_path, "some_kernel") == 7 and bundles.bundles_of(tmp_path, "other") is None


if __name__ == "__main__":
    print(json.dumps(round(compile_kernels(*sys.argv[1:]), 1)))
