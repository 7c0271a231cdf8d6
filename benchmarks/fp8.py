"""Time of products with FP8 weights, dense and grouped, in every form beside bfloat16; one table.

python -m benchmarks.fp8

Shapes are those that DeepGEMM publishes, small ones where there is no accelerator (`--shapes`). Products: `both` has
activations and weights in FP8 (activations quantised before), `weights` bfloat16 activations, `training` activations, weights and
gradients, quantised on the way, with both gradients. The forms take turns, so that whatever slows the device slows all. On an
H200 the last column is the share of the aims that the kernel reaches (`benchmarks.aims`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import aims
from benchmarks.timing import medians
from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Operand, Fp8Weight, quantize_activation, quantize_weight
from qwen35_jax.ops.grouped_linear import grouped_linear
from qwen35_jax.ops.linear import linear

ROUNDS = flags.DEFINE_integer("rounds", 20, "samples of each form, after two that are not counted", lower_bound=1)
PRODUCTS = flags.DEFINE_list("products", ["both", "weights", "training"], "which products")
SIZES = flags.DEFINE_enum("shapes", None, ["published", "small"], "which shapes; small by default where there is no accelerator")


@dataclasses.dataclass(frozen=True)
class Shape:
    """[rows, ins] times [ins, outs]; with groups, so many weights, rows spread evenly."""

    rows: int
    outs: int
    ins: int
    groups: int = 0

    def __str__(self) -> str:
        return f"{self.rows}x{self.outs}x{self.ins}" + (f" in {self.groups}" if self.groups else "")


SHAPES = [
    *(Shape(4096, *size) for size in ((7168, 16384), (4096, 7168), (24576, 1536), (32768, 512))),
    Shape(128, 7168, 16384),
    Shape(4 * 8192, 4096, 7168, 4),
    Shape(4 * 8192, 7168, 2048, 4),
    Shape(256, 1024, 4096, 64),
]
SMALL = [Shape(256, 256, 384), Shape(8, 256, 384), Shape(256, 256, 384, 4)]


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device's data sheet says: TFLOP/s of dense FP8 and bfloat16 products, TB/s of its memory."""

    fp8: float
    bfloat16: float
    memory: float


SHEETS = {
    "NVIDIA H100 80GB HBM3": Device(1979, 989, 3.35),
    "NVIDIA H200": Device(1979, 989, 4.8),
}


def kernel_of(device: jax.Device) -> str | None:
    """The kernels for FP8 weights on a device."""
    if device.platform == "tpu":
        return "pallas_tpu"
    hopper = device.platform == "gpu" and HAS_MOSAIC_GPU and device.compute_capability == "9.0"
    return "pallas_gpu" if hopper else None


def forms_of(device: jax.Device, shape: Shape, product: str) -> list[str]:
    """The implementations of a product on a device. TPUs have no kernel of groups in bfloat16 or trained in FP8."""
    kernel = kernel_of(device)
    missing = kernel is None or (kernel == "pallas_tpu" and shape.groups and product in ("bfloat16", "training"))
    return ["xla"] if missing else ["xla", kernel]


def multiply(form: str, x, w, sizes=None):
    if sizes is None:
        return linear(x, w, "TD,DF->TF", implementation=form)
    return grouped_linear(x, w, sizes, implementation=form)


def trained(form: str, x, w, *sizes):
    """The product and both gradients."""
    y, back = jax.vjp(lambda x, w: multiply(form, x, w, *sizes), x, w)
    return y, back(y)


def operands(shape: Shape, product: str) -> tuple:
    """Random numbers; the sizes of groups where there are any."""
    lead = (shape.groups,) if shape.groups else ()
    x = jax.random.normal(jax.random.key(0), (shape.rows, shape.ins), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (*lead, shape.ins, shape.outs), jnp.bfloat16)
    sizes = (jnp.full(shape.groups, shape.rows // shape.groups, jnp.int32),) if lead else ()
    axes = (len(lead), len(lead) + 1)
    x = jax.jit(quantize_activation)(x) if product == "both" else x
    if product == "training":
        return x, Fp8Operand(w), *sizes
    return (x, w, *sizes) if product == "bfloat16" else (x, jax.jit(lambda w: quantize_weight(w, axes))(w), *sizes)


def floor(shape: Shape, product: str, device: Device) -> float:
    """Seconds that the products, or reading the operands and writing the result once, take at least."""
    flops = 2 * shape.rows * shape.outs * shape.ins * (3 if product == "training" else 1)
    rate = device.bfloat16 if product == "weights" else device.fp8
    kinds = {Fp8Activation: 1, Fp8Weight: 1}
    x, w, *_ = jax.eval_shape(functools.partial(operands, shape, product))
    width_x, width_w = kinds.get(type(x), 2), kinds.get(type(w), 2)
    numbers = shape.rows * (shape.ins * width_x + 2 * shape.outs) + max(1, shape.groups) * shape.ins * shape.outs * width_w
    return max(flops / rate / 1e12, numbers / device.memory / 1e12)


def columns(device: jax.Device) -> list[str]:
    """Names of what a line has times of."""
    return [name for name in ("xla", kernel_of(device), "bfloat16") if name]


def line(shape: Shape, product: str, device: jax.Device) -> str:
    forms, sheet = forms_of(device, shape, product), SHEETS.get(device.device_kind)
    arguments, plain = operands(shape, product), operands(shape, "bfloat16")
    function = trained if product == "training" else multiply
    calls = {form: functools.partial(jax.jit(functools.partial(function, form)), *arguments) for form in forms}
    # bfloat16: XLA's own product where it is dense, the best form where it is grouped.
    best = forms_of(device, shape, "bfloat16")[-1] if shape.groups else "xla"
    calls["bfloat16"] = functools.partial(jax.jit(functools.partial(function, best)), *plain)
    times = medians(calls, ROUNDS.value)
    flops = 2 * shape.rows * shape.outs * shape.ins * (3 if product == "training" else 1)
    cells = [f"{shape!s:>22} {product:>9}"]
    rates = {name: flops / seconds / 1e12 for name, seconds in times.items()}
    for name in columns(device):
        cells.append(f"{times[name] * 1e6:12.0f} {rates[name]:8.2f}" if name in times else f"{'':21}")
    cells.append(f"{times['bfloat16'] / times[forms[-1]]:7.2f}")
    cells.append(f"{floor(shape, product, sheet) / times[forms[-1]]:7.2f}" if sheet else f"{'':>7}")
    case = shape.rows, shape.outs, shape.ins, max(shape.groups, 1)
    cells.append(aims.of_product(device.device_kind, case, rates[forms[-1]]) if product == "both" else "")
    return " ".join(cells).rstrip()


def main(_) -> None:
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}; us and TFLOP/s of each form")
    print("ratio: bfloat16's time to that of the last form; floor: the least possible time, by the data sheet, to that")
    head = " ".join(f"{name:>12} {'TFLOP/s':>8}" for name in columns(device))
    print(f"{'rows x outs x ins':>22} {'product':>9} {head} {'ratio':>7} {'floor':>7} of the aims")
    small = SIZES.value == "small" or (SIZES.value is None and device.platform == "cpu")
    for shape in SMALL if small else SHAPES:
        for product in PRODUCTS.value:
            print(line(shape, product, device), flush=True)


if __name__ == "__main__":
    app.run(main)
