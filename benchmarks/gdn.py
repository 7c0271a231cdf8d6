"""Time of the gated delta rule in its kernels beside its XLA form, forward, and forward with the six gradients; one table.

python -m benchmarks.gdn

The forms take turns call by call, so that whatever slows the device slows both. Where a device has no kernel, only the XLA
form is timed.
"""

from __future__ import annotations

import functools
import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.ops.gated_delta import gated_delta_rule

MODELS = flags.DEFINE_list("models", ["0.8b", "35b-a3b", "397b-a17b"], "presets whose heads are taken")
TIME = flags.DEFINE_integer("time", 8192, "tokens of a sequence", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 1, "sequences", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 20, "calls of each form, after two that are not counted", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of q, k and v")
KERNELS = {"tpu": "pallas_tpu"}


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
    kernel = KERNELS.get(device.platform)
    forms = ["xla"] + ([kernel] if kernel else [])
    print(f"{device.device_kind}, jax {jax.__version__}, {BATCH.value} x {TIME.value} tokens, {DTYPE.value}")
    print(f"{'model':>10} {'heads':>6} {'pass':>8} {'xla, ms':>9} {'kernel, ms':>11} {'ratio':>6}")
    for model in MODELS.value:
        config = ModelConfig.preset(model)
        inputs = make_inputs(config)
        heads = f"{config.linear_num_key_heads}/{config.linear_num_value_heads}"
        for name, function in (("forward", forward), ("both", both)):
            times = medians({form: jax.jit(functools.partial(function, form)) for form in forms}, inputs)
            ours = f"{times[kernel]:11.2f} {times['xla'] / times[kernel]:6.2f}" if kernel else f"{'none':>11} {'':>6}"
            print(f"{model:>10} {heads:>6} {name:>8} {times['xla']:9.2f} {ours}", flush=True)


if __name__ == "__main__":
    app.run(main)
