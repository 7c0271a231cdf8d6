"""The TPU kernels of the causal convolution, both passes, compiled at the shape of a published model, 8,192 tokens in bfloat16
with packed documents: how many instruction bundles they take, and what XLA's form costs. Other models have the same blocks.

python -m tests.aot.test_convolution v5e 35b-a3b
python -m tests.aot.test_convolution v5e 35b-a3b xla
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from qwen35_jax.config import ModelConfig
from qwen35_jax.ops.causal_conv.tpu import CHANNELS, TOKENS
from qwen35_jax.ops.gated_delta_net import convolve
from tests.aot import bundles
from tests.aot.devices import needs_compiler

TIME = 8192
KERNELS = ("causal_conv", "transpose_jvp_causal_conv_gradient")

# Bundles per value head and 64 tokens of q, k and v together, forward and backward, a twentieth above what was measured.
CEILINGS = {("tpu7x", "35b-a3b"): (122, 324)}
SLOW = {("v5e", "35b-a3b"): (126, 328), ("v5p", "35b-a3b"): (126, 328), ("v6e", "35b-a3b"): (122, 322)}


def channels(config: ModelConfig) -> dict[str, int]:
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    return {"q": keys, "k": keys, "v": config.linear_num_value_heads * config.linear_value_head_dim}


def compile_passes(target: str, preset: str, implementation: str = "pallas_tpu") -> dict:
    """Both passes of the convolutions of q, k and v on one device: MB of temporaries, and by the compiler's estimate the cycles
    of what is no kernel, per value head and 64 tokens."""
    config = ModelConfig.preset(preset)
    heads, taps = config.linear_num_value_heads, config.linear_conv_kernel_dim
    mesh, array = bundles.one_device(target)
    x = {name: array(1, TIME, width, dtype=jnp.bfloat16) for name, width in channels(config).items()}
    w = {f"conv_{name}": array(width // 128, 128, taps, dtype=jnp.bfloat16) for name, width in channels(config).items()}

    def forward(x, w, ids):
        split = {name: a.reshape(1, TIME, -1, 128) for name, a in x.items()}
        out, _ = convolve(split, w, ids, None, implementation)
        return [a.reshape(1, TIME, -1) for a in out]

    def backward(x, w, ids, d_out):
        return jax.vjp(lambda x, w: forward(x, w, ids), x, w)[1](d_out)

    ids, found = array(1, TIME, dtype=jnp.int32), {}
    for name, function, arguments in (("forward", forward, (x, w, ids)), ("backward", backward, (x, w, ids, list(x.values())))):
        compiled = bundles.compile_on(mesh, function, arguments)
        cycles = bundles.estimated_cycles(compiled.as_text())
        found[name] = {
            "cycles": round(cycles / (heads * TIME / 64)),
            "temporary": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
        }
    return found


def measure(target: str, preset: str) -> tuple[dict, list[int]]:
    """What `compile_passes` says, and the bundles of each kernel per value head and 64 tokens."""
    config = ModelConfig.preset(preset)
    result, found = bundles.compile_elsewhere("tests.aot.test_convolution", target, preset, kernels=KERNELS)
    per_head = sum(channels(config).values()) / config.linear_num_value_heads * 64
    return result, [round(found[name] * per_head / (TOKENS * CHANNELS)) for name in KERNELS]


def _cases():
    for cases, marks in ((CEILINGS, ()), (SLOW, pytest.mark.slow)):
        yield from (pytest.param(*case, ceilings, id="-".join(case), marks=marks) for case, ceilings in cases.items())


@pytest.mark.parametrize(("target", "preset", "ceilings"), list(_cases()))
def test_convolution(target, preset, ceilings):
    needs_compiler(target)
    result, found = measure(target, preset)
    print(target, preset, result, found)
    assert all(n <= ceiling for n, ceiling in zip(found, ceilings, strict=True)), found
    assert result["forward"]["temporary"] < 16, result  # MB: no copy of q, k or v, the smallest of which has 33


if __name__ == "__main__":
    print(json.dumps(compile_passes(*sys.argv[1:])))
