"""Time of one layer's decode step of Gated DeltaNet in its kernel beside its XLA form, and the share of the memory's bandwidth
that each reaches; one table.

python -m benchmarks.decode

A step reads and writes the state of every slot once; its bytes over its time are set beside those of a copy of the same array
(read and written once too) in the same process. The forms and the copy take turns. On an H200 the last column is the share of
the aim that a form reaches (`benchmarks.aims`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import aims
from benchmarks.timing import step_medians
from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.ops.forms import resolve_forms
from qwen35_jax.ops.gated_delta_net import gated_delta_net_step
from qwen35_jax.sharding import make_mesh

MODELS = flags.DEFINE_list("models", ["0.8b", "35b-a3b", "397b-a17b"], "presets whose heads are taken")
SLOTS = flags.DEFINE_list("slots", ["1", "64", "256"], "sequences")
ROUNDS = flags.DEFINE_integer("rounds", 20, "samples of each form, after two that are not counted", lower_bound=1)


def make_inputs(config: ModelConfig, slots: int):
    """x, w and state of gated_delta_net_step for one layer, of random numbers."""
    keys, heads, taps = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_conv_kernel_dim
    parts = {
        "q": (keys, config.linear_key_head_dim),
        "k": (keys, config.linear_key_head_dim),
        "v": (heads, config.linear_value_head_dim),
    }
    seeds = iter(jax.random.split(jax.random.key(0), 16))

    def normal(*shape, dtype=config.dtype):
        return jax.random.normal(next(seeds), shape, dtype)

    x = {name: normal(slots, 1, *part) for name, part in parts.items()} | {name: normal(slots, 1, heads) for name in "ab"}
    w = {f"conv_{name}": normal(*part, taps) for name, part in parts.items()}
    w |= {"A_log": normal(heads, dtype=jnp.float32), "dt_bias": normal(heads)}
    state = {f"conv_{name}": normal(slots, taps - 1, *part) for name, part in parts.items()}
    state["recurrent"] = normal(slots, heads, parts["k"][1], parts["v"][1], dtype=jnp.float32)
    return x, w, state


def measure(config: ModelConfig, slots: int, forms: list[str]) -> tuple[int, dict[str, float]]:
    """Bytes of state that a step moves, and the seconds of each form and of the copy."""
    x, w, state = make_inputs(config, slots)
    active = jnp.ones((slots, 1), bool)

    def step(form, state):
        return gated_delta_net_step(x, w, state, active=active, implementation=form)[1]

    steps = {form: functools.partial(step, form) for form in forms}
    # Beyond rounding's reach: a copy that cannot be left out.
    steps["copy"] = lambda state: {"recurrent": state["recurrent"] * 1.0000001}
    states = {name: jax.tree.map(jnp.copy, state) for name in steps}
    states["copy"] = {"recurrent": states["copy"]["recurrent"]}
    return 2 * state["recurrent"].nbytes, step_medians(steps, states, ROUNDS.value)


def main(_) -> None:
    for model in MODELS.value:
        if model not in PRESETS:
            raise app.UsageError(f"no preset {model!r}; choose from {', '.join(PRESETS)}")
    mesh = make_mesh("1x1")
    device = mesh.devices.flat[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    print(f"{'model':>10} {'slots':>6} {'form':>11} {'microseconds':>13} {'GB/s':>8} {'of copy':>8} of the aim")
    for model in MODELS.value:
        config = ModelConfig.preset(model)
        forms = list(dict.fromkeys(["xla", resolve_forms(mesh, config).gated_delta_step]))
        for slots in map(int, SLOTS.value):
            moved, times = measure(config, slots, forms)
            for name, seconds in times.items():
                of_copy = times["copy"] / seconds
                share = "" if name == "copy" else aims.of_decode(device.device_kind, slots, of_copy)
                rate = f"{moved / seconds / 1e9:8.1f} {of_copy:8.2f} {share}".rstrip()
                print(f"{model:>10} {slots:>6} {name:>11} {seconds * 1e6:13.1f} {rate}", flush=True)


if __name__ == "__main__":
    app.run(main)
