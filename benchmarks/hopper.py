"""Time of each Hopper kernel by itself, without what XLA does around it: parts of the gated delta rule, its decode step beside a
copy, attention to a cache beside XLA's form, products in FP8; on an H100 or H200 with jax 0.11 or newer.

python -m benchmarks.hopper
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import aims
from benchmarks.inputs import normal, rule_inputs
from benchmarks.timing import medians, step_medians
from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.ops.attention import cached_attention
from qwen35_jax.ops.fp8 import quantize_activation, quantize_weight
from qwen35_jax.ops.gated_delta import gated_delta_step, gpu
from qwen35_jax.ops.gated_delta.gates import gates_of
from qwen35_jax.ops.gated_delta.gpu_states import forward_kernel, reverse_kernel
from qwen35_jax.ops.hopper.rows import rows_times

PARTS = flags.DEFINE_list("parts", ["rule", "decode", "attention", "fp8"], "which kernels")
ROUNDS = flags.DEFINE_integer("rounds", 8, "samples of each, after two that are not counted", lower_bound=1)
# (sequences, tokens, key heads, value heads); (slots, key heads, value heads); (sequences, new tokens, tokens held, heads, key
# heads); (rows, outs, ins, groups)
RULES = [(4, 8192, 16, 64), (1, 32768, 16, 32), (1, 8192, 16, 32)]
DECODES = [(64, 16, 16), (64, 16, 32), (64, 16, 64), (256, 16, 64)]
ATTENTIONS = [(64, 1, 8192, 16, 2), (64, 1, 32767, 16, 2), (1, 1, 32767, 16, 2), (1, 2048, 30720, 16, 2), (1, 2048, 0, 16, 2)]
PRODUCTS = [(4096, 7168, 16384, 1), (4096, 4096, 7168, 1), (4 * 8192, 4096, 7168, 4), (4 * 8192, 7168, 2048, 4)]
BLOCKS = {"product": False, "in pairs": True}
HEAD, ATTENTION_HEAD, PLACES = 128, 256, 32768


def rule(shape) -> dict[str, float]:
    """Gates and the kernels of both passes; `saving` is the forward one that keeps what the gradient needs."""
    q, k, v, g, beta = rule_inputs(*shape)
    state = jnp.zeros((shape[0], shape[3], HEAD, HEAD), jnp.float32)
    g, beta = (gpu._chunked(x) for x in gates_of(g, beta, None))
    gates = jax.jit(gpu._gate_rows)(g, beta)
    chunks = jax.jit(functools.partial(gpu._chunks, normalize_qk=True))
    squares, scalars = chunks(q, k, gates)

    def states(kernel, save):
        return functools.partial(jax.jit(functools.partial(gpu._states, kernel, save=save)), q, k, v, squares, scalars, state)

    functions = {
        "gates": functools.partial(jax.jit(gpu._gate_rows), g, beta),
        "chunks": functools.partial(chunks, q, k, gates),
        "forward": states(forward_kernel, False),
        "saving": states(forward_kernel, True),
        "reverse": states(reverse_kernel, True),
    }
    *_, before, updates = functions["saving"]()
    dv, _, d_states = functions["reverse"]()
    gradients = jax.jit(functools.partial(gpu._gradients, normalize_qk=True))
    functions["gradients"] = functools.partial(gradients, q, k, gates, scalars, updates, v, dv, before, d_states)
    return medians(functions, ROUNDS.value)


def decode(shape) -> dict[str, float]:
    """The recurrence of one token in XLA's form and in the kernel, and a copy of the state."""
    slots, keys, heads = shape
    inputs = rule_inputs(slots, 1, keys, heads)
    steps = {
        form: lambda state, form=form: gated_delta_step(*inputs, state, implementation=form)[1] for form in ("xla", "pallas_gpu")
    }
    steps["copy"] = lambda state: state * 1.0000001
    states = {name: normal(5, slots, heads, HEAD, HEAD, dtype=jnp.float32) for name in steps}
    return step_medians(steps, states, ROUNDS.value)


def attention(shape) -> dict[str, float]:
    """New tokens of `sequences` slots of PLACES places; the time of a copy of the keys and values that they see."""
    sequences, tokens, held, heads, groups = shape
    q, k, v = (normal(i, sequences, tokens, n, ATTENTION_HEAD) for i, n in enumerate((heads, groups, groups)))
    places = {"start": jnp.full(sequences, held, jnp.int32), "count": jnp.full(sequences, tokens, jnp.int32)}

    def step(form, state):
        out, *caches = cached_attention(state[0], k, v, *state[1:], **places, implementation=form)
        return out, *caches

    steps = {form: functools.partial(step, form) for form in ("xla", "pallas_gpu")}
    cache = (sequences, groups, PLACES, ATTENTION_HEAD)
    states = {name: (q + 0, *(normal(i, *cache) for i in (3, 4))) for name in steps}
    steps["copy"] = lambda state: [x * 1.0000001 for x in state]
    states["copy"] = [normal(i, sequences, groups, held + tokens, ATTENTION_HEAD) for i in (3, 4)]
    return step_medians(steps, states, ROUNDS.value)


def fp8(shape) -> dict[str, float]:
    """The product with a weight that lies as the tensor cores want it, by thread blocks alone and in pairs, and turning one
    that does not."""
    rows, outs, ins, groups = shape
    x = jax.jit(quantize_activation)(normal(0, rows, ins))
    w = jax.jit(lambda w: quantize_weight(w, (1, 2)))(normal(1, groups, ins, outs))
    turn = jax.jit(lambda values: values.swapaxes(1, 2))
    sizes, scales = jnp.full(groups, rows // groups, jnp.int32), w.scales.astype(jnp.float32)

    @functools.partial(jax.jit, static_argnames="pairs")
    def product(values, turned, pairs):
        return rows_times(values, turned, sizes, transposed=True, x_scales=x.scales, w_scales=scales, out_dtype=jnp.bfloat16,
                          pairs=pairs)  # fmt: skip

    turned = turn(w.values)
    functions = {name: functools.partial(product, x.values, turned, pairs) for name, pairs in BLOCKS.items()}
    return medians(functions | {"turning w": lambda: turn(w.values)}, ROUNDS.value)


def attention_rate(shape, seconds: float) -> str:
    """Of one token the bytes of keys and values a second, of more the operations of the products with those that each sees."""
    sequences, tokens, held, heads, groups = shape
    if tokens == 1:
        return f"{4 * sequences * (held + 1) * groups * ATTENTION_HEAD / seconds / 1e12:.2f} TB/s"
    seen = tokens * held + tokens * (tokens + 1) / 2
    return f"{4 * sequences * seen * heads * ATTENTION_HEAD / seconds / 1e12:.0f} TFLOP/s"


def main(_) -> None:
    device = jax.devices()[0]
    if device.platform != "gpu" or not HAS_MOSAIC_GPU or device.compute_capability != "9.0":
        raise app.UsageError(f"needs an H100 or H200 and jax 0.11 or newer; this is {device.device_kind}, jax {jax.__version__}")
    kinds = {"rule": (rule, RULES), "decode": (decode, DECODES), "attention": (attention, ATTENTIONS), "fp8": (fp8, PRODUCTS)}
    print(f"{device.device_kind}, jax {jax.__version__}; microseconds")
    for part in PARTS.value:
        if part not in kinds:
            raise app.UsageError(f"no part {part!r}; choose from {', '.join(kinds)}")
        function, shapes = kinds[part]
        for shape in shapes:
            times, share = function(shape), ""
            cells = [f"{name} {seconds * 1e6:.1f}" for name, seconds in times.items()]
            if part == "fp8":
                rates = [2 * shape[0] * shape[1] * shape[2] / times[name] / 1e12 for name in BLOCKS]
                cells.append(" and ".join(f"{rate:.0f}" for rate in rates) + " TFLOP/s")
                share = aims.of_product(device.device_kind, shape, max(rates))
            if part == "decode":
                of_copy = times["copy"] / times["pallas_gpu"]
                cells.append(f"of copy {of_copy:.2f}")
                share = aims.of_decode(device.device_kind, shape[0], of_copy)
            if part == "attention":
                cells.append(attention_rate(shape, times["pallas_gpu"]))
            if share:
                cells.append(f"of the aims {share}")
            print(part, "x".join(map(str, shape)), ", ".join(cells), flush=True)


if __name__ == "__main__":
    app.run(main)
