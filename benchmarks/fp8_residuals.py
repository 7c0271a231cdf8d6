"""What the backward pass of FP8 training keeps in place of what bfloat16 training keeps, counted from shapes."""

from __future__ import annotations

import collections
import math

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from qwen35_jax import command
from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.train.config import default_config
from qwen35_jax.train.run import find_origin, make_run
from qwen35_jax.train.step import abstract_batch

USAGE = """
Bytes that the closure of jax.vjp holds for one unit of a model, with bfloat16 and with FP8 products; nothing is computed.

  python -m benchmarks.fp8_residuals --model 35b-a3b
"""
MODEL = flags.DEFINE_enum("model", "35b-a3b", PRESETS, "preset")
TOKENS = flags.DEFINE_integer("tokens", 4096, "tokens of the one sequence", lower_bound=1)


def kept(model: str, tokens: int, fp8: bool) -> collections.Counter:
    """(shape, dtype) -> how many arrays of that kind the backward pass of one unit holds; parameters are left out.

    Without rematerialisation, since the other policies keep no input of a product.
    """
    c = default_config()
    c.model.source, c.model.random_weights, c.remat, c.loss.mtp, c.fp8.enabled = model, True, "none", 0.0, fp8
    layers = ModelConfig.preset(model).full_attention_interval
    c.model.changes = ConfigDict({"num_hidden_layers": layers, "mtp_num_hidden_layers": 0})
    c.data.train, c.data.sequence_length, c.data.batch_size = ("unused",), tokens, 1
    run = make_run(c, find_origin(c))
    params, batch = run.state["params"], abstract_batch(run.model, 1, tokens)
    closure = jax.eval_shape(lambda params, batch: jax.vjp(lambda p: run.loss.sums(p, {}, batch), params)[1], params, batch)
    weights = {x.shape for x in jax.tree.leaves(params)} | {x.shape[1:] for x in jax.tree.leaves(params["units"])}
    return collections.Counter((x.shape, str(x.dtype)) for x in jax.tree.leaves(closure) if x.shape not in weights)


def linear_layers(bfloat16: collections.Counter, fp8: collections.Counter) -> tuple[int, int]:
    """Bytes of the inputs of the FP8 layers, as bfloat16 training keeps them and as FP8 training does, scales included."""
    values = collections.Counter({shape: n for (shape, dtype), n in fp8.items() if dtype == "float8_e4m3fn"})
    missing = {shape for shape, n in values.items() if bfloat16[shape, "bfloat16"] < n}
    assert not missing, f"bfloat16 training does not keep all arrays of the shapes {missing}"
    scales = {key: n for key, n in (fp8 - bfloat16).items() if key[1] != "float8_e4m3fn"}
    plain = size({(shape, "bfloat16"): n for shape, n in values.items()})
    return plain, plain // 2 + size(scales)


def size(arrays: dict) -> int:
    """Bytes."""
    return sum(n * math.prod(shape) * jnp.dtype(dtype).itemsize for (shape, dtype), n in arrays.items())


def main(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}: options start with --")
    bfloat16, fp8 = (kept(MODEL.value, TOKENS.value, fp8) for fp8 in (False, True))
    rows = {"inputs of the FP8 layers": linear_layers(bfloat16, fp8), "all that is kept": (size(bfloat16), size(fp8))}
    print(f"one unit of {MODEL.value}, {TOKENS.value} tokens, no rematerialisation\n\n| MiB | bfloat16 | FP8 | ratio |")
    print("| --- | --- | --- | --- |")
    for name, (plain, narrow) in rows.items():
        print(f"| {name} | {plain / 2**20:.1f} | {narrow / 2**20:.1f} | {narrow / plain:.3f} |")


if __name__ == "__main__":
    command.run(main, USAGE)
