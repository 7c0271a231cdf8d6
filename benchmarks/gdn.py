"""Time of the gated delta rule in its kernels beside its XLA form, forward, backward (six gradients) and both; one table.

python -m benchmarks.gdn

The forms take turns, so that whatever slows the device slows all. Where a device has no kernel, only the XLA
form is timed. On a GPU flash-linear-attention takes its turn where it is installed (with torch; start with
XLA_PYTHON_CLIENT_PREALLOCATE=false, or JAX keeps the memory to itself), and on an H100 or H200 the floor stands beside them:
the larger of the time of the products at the rate of large matrix products, and of reading and writing each array once. On an
H200 the last column is the share of the aims that the kernel reaches (`benchmarks.aims`), for the sizes that have some.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import aims
from benchmarks.inputs import rule_inputs
from benchmarks.timing import medians
from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.ops.forms import resolve_forms
from qwen35_jax.ops.gated_delta import gated_delta_rule

MODELS = flags.DEFINE_list("models", ["0.8b", "35b-a3b", "397b-a17b"], "presets whose heads are taken")
TIME = flags.DEFINE_integer("time", 8192, "tokens of a sequence", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 1, "sequences", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 20, "samples of each form, after two that are not counted", lower_bound=1)
FORMS = flags.DEFINE_list("forms", ["xla", "kernel", "fla"], "which of them; on a GPU XLA takes minutes to choose its tiles")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of q, k and v")
# Operations and bytes a second: an H200 as measured (8192^3 in bfloat16; a copy); an H100 has the same matrix units, and its
# memory is as in the data sheet.
RATES = {"H200": (790e12, 4.3e12), "H100": (790e12, 3.35e12)}


def make_inputs(config: ModelConfig) -> tuple[jax.Array, ...]:
    """Of one layer of the model."""
    heads = config.linear_num_key_heads, config.linear_num_value_heads
    return rule_inputs(BATCH.value, TIME.value, *heads, (config.linear_key_head_dim, config.linear_value_head_dim), DTYPE.value)


def forward(form: str, *inputs):
    return gated_delta_rule(*inputs, implementation=form)


def passes(form: str, inputs) -> dict[str, Callable[[], object]]:
    """The forward pass; the backward one of what the forward one left; both, for cotangents of the values' own shapes."""
    run = functools.partial(forward, form)
    values, back = jax.jit(lambda *x: jax.vjp(run, *x))(*inputs)
    ones = jax.tree.map(jnp.ones_like, values)
    backward = jax.jit(lambda back, cotangents: back(cotangents))

    def both(cotangents, *x):
        values, back = jax.vjp(run, *x)
        return values, back(cotangents)

    functions = {
        "forward": (jax.jit(run), inputs),
        "backward": (backward, (back, ones)),
        "both": (jax.jit(both), (ones, *inputs)),
    }
    return {name: functools.partial(function, *arguments) for name, (function, arguments) in functions.items()}


def floor(config: ModelConfig, kind: str, name: str) -> float | None:
    """Milliseconds that no chunked form on this device can go below, in bfloat16; None for devices without RATES.

    Products per token and value head with chunks of 64, scores shared by the value heads of a key head: forward
    6 H^2 + 4 H C (1 + 1 / group); backward seven of C H H and ten of C C H per chunk.
    """
    rates = next((rates for device, rates in RATES.items() if device in kind), None)
    if rates is None:
        return None
    tokens, chunk, width = BATCH.value * TIME.value, 64, config.linear_key_head_dim
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    operations = moved = 0
    if name != "backward":
        operations += tokens * heads * (6 * width**2 + 4 * width * chunk * (1 + keys / heads))
        moved += tokens * (4 * width * (keys + heads) + 8 * heads)
    if name != "forward":
        operations += tokens * heads * 2 * (7 * width**2 + 10 * chunk * width)
        moved += tokens * (4 * width * (2 * keys + 2 * heads) + 16 * heads)
    return max(operations / rates[0], moved / rates[1]) * 1e3


class _Torch:
    """What PyTorch's functions leave, for `jax.block_until_ready`."""

    def block_until_ready(self):
        import torch

        torch.cuda.synchronize()
        return self


def fla_passes(inputs) -> dict[str, Callable[[], object]]:
    """flash-linear-attention (Triton) on the same numbers."""
    import torch
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    arrays = [np.asarray(x.astype(jnp.float32)) for x in inputs]
    dtypes = [getattr(torch, x.dtype.name) for x in inputs]
    tensors = [torch.tensor(x, dtype=dtype, device="cuda") for x, dtype in zip(arrays, dtypes, strict=True)]
    wanted = [x.clone().requires_grad_() for x in tensors]

    def run(q, k, v, g, beta):
        return chunk_gated_delta_rule(q, k, v, g=g, beta=beta, output_final_state=True, use_qk_l2norm_in_kernel=True)

    kept = run(*wanted)
    ones = [torch.ones_like(x) for x in kept]

    def forward():
        with torch.no_grad():
            run(*tensors)
        return _Torch()

    def backward():
        torch.autograd.grad(kept, wanted, ones, retain_graph=True)
        return _Torch()

    def both():
        torch.autograd.grad(run(*wanted), wanted, ones)
        return _Torch()

    return {"forward": forward, "backward": backward, "both": both}


def main(_) -> None:
    for model in MODELS.value:
        if model not in PRESETS:
            raise app.UsageError(f"no preset {model!r}; choose from {', '.join(PRESETS)}")
    for form in FORMS.value:
        if form not in ("xla", "kernel", "fla"):
            raise app.UsageError(f"no form {form!r}; choose from xla, kernel, fla")
    device = jax.devices()[0]
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=[device])
    has_fla = "fla" in FORMS.value and device.platform == "gpu" and importlib.util.find_spec("fla") is not None
    print(f"{device.device_kind}, jax {jax.__version__}, {BATCH.value} x {TIME.value} tokens, {DTYPE.value}")
    if "fla" in FORMS.value and device.platform == "gpu" and not has_fla:
        print("flash-linear-attention is not installed: its column stays empty")
    columns = ("xla, ms", "kernel, ms", "ratio", "fla, ms", "floor, ms")
    print(f"{'model':>10} {'heads':>6} {'pass':>8}" + "".join(f"{name:>12}" for name in columns) + "  of the aims")
    for model in MODELS.value:
        config = ModelConfig.preset(model).replace(dtype=DTYPE.value)
        kernel, inputs = resolve_forms(mesh, config).gated_delta_rule, make_inputs(config)
        heads = f"{config.linear_num_key_heads}/{config.linear_num_value_heads}"
        wanted = {"xla": "xla", "kernel": kernel}
        forms = {form: passes(form, inputs) for form in dict.fromkeys(wanted[name] for name in FORMS.value if name in wanted)}
        if has_fla:
            forms["fla"] = fla_passes(inputs)
        for name in ("forward", "backward", "both"):
            times = medians({form: functions[name] for form, functions in forms.items()}, ROUNDS.value)
            times = {form: seconds * 1e3 for form, seconds in times.items()}
            ours = times.get(kernel) if kernel != "xla" else None
            least = floor(config, device.device_kind, name) if DTYPE.value == "bfloat16" else None
            plain = times.get("xla")
            row = (plain, ours, plain / ours if plain and ours else None, times.get("fla"), least)
            cells = "".join(f"{'':>12}" if x is None else f"{x:12.3f}" for x in row)
            case = name, BATCH.value, TIME.value, config.linear_num_key_heads, config.linear_num_value_heads
            share = aims.of_rule(device.device_kind, case, ours) if ours and DTYPE.value == "bfloat16" else ""
            print(f"{model:>10} {heads:>6} {name:>8}{cells}  {share}".rstrip(), flush=True)


if __name__ == "__main__":
    app.run(main)
