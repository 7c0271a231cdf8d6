"""Peak anonymous memory of converting a synthetic checkpoint both ways and of loading it: one table.

python benchmarks/convert_memory.py --gb 6 --experts 64
"""

from __future__ import annotations

import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import jax
import ml_dtypes
import numpy as np
from absl import app, flags
from etils import epath

from qwen35_jax.checkpoint import CanonicalSource, load_params, open_source
from qwen35_jax.checkpoint.names import tensor_parts
from qwen35_jax.checkpoint.safetensors_file import make_header, write_safetensors
from qwen35_jax.checkpoint.source import INDEX
from qwen35_jax.config import ModelConfig
from qwen35_jax.model import Model
from qwen35_jax.sharding import Sharding, make_mesh

GB = flags.DEFINE_float("gb", 6.0, "size of the synthetic checkpoint")
EXPERTS = flags.DEFINE_integer("experts", 0, "experts a layer, stored one by one; 0 is a dense model")
WORK = flags.DEFINE_string("work", None, "directory with room for three copies; default: a temporary one")
LOAD = flags.DEFINE_string("load", None, "only load this checkpoint on 1x1 (what the program starts itself as)")
STACKED = flags.DEFINE_bool("stacked", False, "load units stacked")

BF16 = np.dtype(ml_dtypes.bfloat16)
SHARD_BYTES = 3 << 30
PIECE = 32 << 20


def synthetic_config(gigabytes: float, experts: int) -> dict:
    """A configuration of about this many bytes in bf16: a quarter of them vocabulary, the others layers."""
    text = {
        "model_type": "qwen3_5_moe_text" if experts else "qwen3_5_text",
        "hidden_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 2,
        "num_hidden_layers": 2,
        "vocab_size": int(gigabytes * 1e9 / 4 / 4096 / 2 / 2) // 128 * 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
    }
    if experts:
        more = {"num_experts": experts, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 1024}
        text |= more | {"moe_intermediate_size": 1024}
    else:
        text |= {"intermediate_size": 12288}
    config = {"model_type": text["model_type"].removesuffix("_text"), "text_config": text}
    one = sum(_bytes(s) for s in _shapes(config).values())
    text["num_hidden_layers"] = 4
    unit = sum(_bytes(s) for s in _shapes(config).values()) - one
    text["num_hidden_layers"] = 2 * max(1, math.ceil((gigabytes * 1e9 - one) / unit) + 1)
    return config


def _bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * BF16.itemsize


def _shapes(config: dict) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, parts in tensor_parts(ModelConfig.from_hf(config), mtp=False).items():
        shape = parts[0][1].tensor_shape
        base, _, kind = name.partition(".mlp.experts.")
        for e in range(shape[0] if kind else 0):
            for part in ("gate", "up") if kind.startswith("gate") else ("down",):
                rows = shape[1] // 2 if part != "down" else shape[1]
                shapes[f"{base}.mlp.experts.{e}.{part}_proj.weight"] = (rows, shape[2])
        if not kind:
            shapes[name] = shape
    return shapes


def write_checkpoint(directory: pathlib.Path, config: dict) -> None:
    """config.json and shards of random numbers."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shards: list[dict] = [{}]
    for name, shape in _shapes(config).items():
        if sum(map(_bytes, shards[-1].values())) + _bytes(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    noise = np.random.default_rng(0).normal(size=PIECE // 2).astype(BF16)
    weight_map = {}
    for i, shapes in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        header = make_header({n: (BF16, s) for n, s in shapes.items()})
        sizes = [_bytes(s) for s in shapes.values()]
        pieces = (noise[: min(PIECE, size - at) // 2] for size in sizes for at in range(0, size, PIECE))
        write_safetensors(epath.Path(directory / name), header, pieces)
    index = {"metadata": {"total_size": sum(_bytes(s) for x in shards for s in x.values())}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))


def load(path: str) -> None:
    source = open_source(path)
    config = ModelConfig.from_hf(source.config)
    abstract = Model(config, Sharding(make_mesh("1x1"))).abstract_params(STACKED.value)
    begin = time.perf_counter()
    params = load_params(CanonicalSource(source, config), config, abstract)
    jax.block_until_ready(params)
    print(f"{time.perf_counter() - begin:.2f}")


def measure(*command: str) -> tuple[float, float, str]:
    """Runs a command; (peak anonymous resident GiB, seconds, its output)."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    peak = 0

    def watch():
        nonlocal peak
        while process.poll() is None:
            try:
                text = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            lines = [line for line in text.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *(int(line.split()[1]) for line in lines)])
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    output = process.communicate()[0]
    thread.join()
    if process.returncode:
        raise SystemExit(f"{command} ended with status {process.returncode}")
    return peak / 2**20, time.perf_counter() - begin, output.strip()


def main(arguments: list[str]) -> None:
    if LOAD.value:
        load(LOAD.value)
        return
    work = pathlib.Path(tempfile.mkdtemp(dir=WORK.value))
    try:
        config = synthetic_config(GB.value, EXPERTS.value)
        write_checkpoint(work / "hf", config)
        source = open_source(str(work / "hf"))
        canonical = CanonicalSource(source, ModelConfig.from_hf(config))
        sizes = [_bytes(t.shape) for t in canonical.tensors.values()]
        print(f"{sum(sizes) / 2**30:.2f} GiB in {len(source.tensors)} tensors, largest array {max(sizes) / 2**30:.2f} GiB")
        print(f"{'step':<22} {'peak anonymous GiB':>18} {'seconds':>8}")
        convert = ("-m", "qwen35_jax.convert")
        steps = {
            "interpreter": ("-c", "import time; time.sleep(0.3)"),
            "convert --to orbax": (*convert, str(work / "hf"), str(work / "orbax")),
            "convert --to hf": (*convert, str(work / "orbax"), str(work / "back"), "--to", "hf"),
            "load hf": (__file__, "--load", str(work / "hf")),
            "load hf stacked": (__file__, "--stacked", "--load", str(work / "hf")),
            "load orbax": (__file__, "--load", str(work / "orbax")),
        }
        for name, command in steps.items():
            peak, seconds, output = measure(*command)
            print(f"{name:<22} {peak:>18.2f} {seconds:>8.1f} {f'(load_params alone {output} s)' if output else ''}")
        if subprocess.run(["diff", "-r", work / "hf", work / "back"], check=False).returncode:
            raise SystemExit("the exported directory differs from the original")
        print("the exported directory equals the original")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    app.run(main)
