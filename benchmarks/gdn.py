"""Time of the gated delta rule in its kernels beside its XLA form, forward, and forward with the six gradients; one table.

python -m benchmarks.gdn

The forms take turns call by call, so that whatever slows the device slows all. Where a device has no kernel, only the XLA
form is timed. On a GPU flash-linear-attention takes its turn where it is installed (with torch; start with
XLA_PYTHON_CLIENT_PREALLOCATE=false, or JAX keeps the memory to itself), and on an H100 or H200 the floor stands beside them:
the larger of the time of the products at the rate of large matrix products, and of reading and writing each array once.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.ops.forms import resolve_forms
from qwen35_jax.ops.gated_delta import gated_delta_rule

MODELS = flags.DEFINE_list("models", ["0.8b", "35b-a3b", "397b-a17b"], "presets whose heads are taken")
TIME = flags.DEFINE_integer("time", 8192, "tokens of a sequence", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 1, "sequences", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 20, "calls of each form, after two that are not counted", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of q, k and v")
# Operations and bytes a second: an H200 as measured (8192^3 in bfloat16; a copy); an H100 has the same matrix units, and its
# memory is as in the data sheet.
RATES = {"H200": (790e12, 4.3e12), "H100": (790e12, 3.35e12)}


def make_inputs(config: ModelConfig) -> tuple[jax.Array, ...]:
    """Random q, k, v, g, beta."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    seeds = jax.random.split(jax.random.key(0), 5)
    shapes = [(keys, config.linear_key_head_dim)] * 2 + [(heads, config.linear_value_head_dim)]
    rows = BATCH.value, TIME.value
    q, k, v = (jax.random.normal(s, (*rows, *shape), DTYPE.value) for s, shape in zip(seeds[:3], shapes, strict=True))
    g = -jnp.exp(jax.random.normal(seeds[3], (*rows, heads)) - 3)
    return q, k, v, g, jax.random.uniform(seeds[4], (*rows, heads))


def forward(form: str, *inputs):
    return gated_delta_rule(*inputs, implementation=form)


def both(form: str, *inputs):
    """Forward, and the gradients for a cotangent of ones."""
    values, back = jax.vjp(functools.partial(forward, form), *inputs)
    return values, back(jax.tree.map(jnp.ones_like, values))


def floor(config: ModelConfig, kind: str, backward: bool) -> float | None:
    """Milliseconds that no chunked form on this device can go below, in bfloat16; None for devices without RATES.

    Products per token and value head with chunks of 64, scores shared by the value heads of a key head: forward
    6 H^2 + 4 H C (1 + 1 / group); backward seven of C H H and ten of C C H per chunk.
    """
    rates = next((rates for name, rates in RATES.items() if name in kind), None)
    if rates is None:
        return None
    tokens, chunk, width = BATCH.value * TIME.value, 64, config.linear_key_head_dim
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    operations = tokens * heads * (6 * width**2 + 4 * width * chunk * (1 + keys / heads))
    moved = tokens * (4 * width * (keys + heads) + 8 * heads)
    if backward:
        operations += tokens * heads * 2 * (7 * width**2 + 10 * chunk * width)
        moved += tokens * (4 * width * (2 * keys + 2 * heads) + 16 * heads)
    return max(operations / rates[0], moved / rates[1]) * 1e3


def fla_function(inputs, backward: bool):
    """flash-linear-attention (Triton) on the same numbers: a function that waits until the device is done."""
    import torch
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    arrays = [np.asarray(x.astype(jnp.float32)) for x in inputs]
    dtypes = [getattr(torch, x.dtype.name) for x in inputs]
    tensors = [torch.tensor(x, dtype=dtype, device="cuda") for x, dtype in zip(arrays, dtypes, strict=True)]
    tensors = [x.requires_grad_(backward) for x in tensors]

    def run(*_):
        q, k, v, g, beta = tensors
        values = chunk_gated_delta_rule(q, k, v, g=g, beta=beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
        if backward:
            torch.autograd.grad(values, tensors, [torch.ones_like(x) for x in values])
        torch.cuda.synchronize()

    return run


def medians(functions: dict, inputs) -> dict[str, float]:
    """Median milliseconds of each function, called in turns."""
    seconds = {form: [] for form in functions}
    for _ in range(ROUNDS.value + 2):
        for form, function in functions.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            seconds[form].append(time.perf_counter() - begin)
    return {form: statistics.median(times[2:]) * 1e3 for form, times in seconds.items()}


def main(_) -> None:
    for model in MODELS.value:
        if model not in PRESETS:
            raise app.UsageError(f"no preset {model!r}; choose from {', '.join(PRESETS)}")
    device = jax.devices()[0]
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=[device])
    has_fla = device.platform == "gpu" and importlib.util.find_spec("fla") is not None
    print(f"{device.device_kind}, jax {jax.__version__}, {BATCH.value} x {TIME.value} tokens, {DTYPE.value}")
    columns = ("xla, ms", "kernel, ms", "ratio", "fla, ms", "floor, ms")
    print(f"{'model':>10} {'heads':>6} {'pass':>8}" + "".join(f"{name:>12}" for name in columns))
    for model in MODELS.value:
        config = ModelConfig.preset(model).replace(dtype=DTYPE.value)
        kernel, inputs = resolve_forms(mesh, config).gated_delta_rule, make_inputs(config)
        heads = f"{config.linear_num_key_heads}/{config.linear_num_value_heads}"
        for name, function in (("forward", forward), ("both", both)):
            functions = {form: jax.jit(functools.partial(function, form)) for form in {"xla": 0, kernel: 0}}
            if has_fla:
                functions["fla"] = fla_function(inputs, name == "both")
            times = medians(functions, inputs)
            ours = times[kernel] if kernel != "xla" else None
            least = floor(config, device.device_kind, name == "both") if DTYPE.value == "bfloat16" else None
            row = (times["xla"], ours, ours and times["xla"] / ours, times.get("fla"), least)
            cells = "".join(f"{'':>12}" if x is None else f"{x:12.2f}" for x in row)
            print(f"{model:>10} {heads:>6} {name:>8}{cells}", flush=True)


if __name__ == "__main__":
    app.run(main)
