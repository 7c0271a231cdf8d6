"""Every tensor is accounted for before any is read: one error lists what is missing, unexpected or wrong."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from qwen35_jax.checkpoint.canonical import CanonicalSource, source_has_mtp, source_has_vision
from qwen35_jax.checkpoint.names import halves, scale_name, scale_shape, tensor_parts, vision_shapes
from qwen35_jax.checkpoint.safetensors_file import DTYPE_NAMES
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError

FLOATS = tuple(np.dtype(t) for t in (ml_dtypes.bfloat16, np.float32, np.float16))
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
LISTED = 20


@dataclasses.dataclass(frozen=True)
class Expected:
    """A tensor that the configuration asks for. `fp8`: it may be quantised, with its scales beside it."""

    shape: tuple[int, ...]
    fp8: bool = False


def expected_tensors(source: CanonicalSource, config: ModelConfig, *, mtp: bool = False) -> dict[str, Expected]:
    """What the source must hold: the text model; vision and (unless `mtp` demands it) MTP where any of it is there."""
    parts = tensor_parts(config, mtp=mtp or source_has_mtp(source))
    expected = {name: Expected(views[0][1].tensor_shape, views[0][1].fp8) for name, views in parts.items()}
    if source_has_vision(source):
        expected |= {name: Expected(shape) for name, shape in vision_shapes(config).items()}
    if config.tie_word_embeddings and "lm_head.weight" in source.tensors:
        expected["lm_head.weight"] = Expected((config.vocab_size, config.hidden_size))  # a copy of the embedding; not loaded
    return expected


def check(source: CanonicalSource, config: ModelConfig, *, mtp: bool = False) -> None:
    """UserError listing everything in which the source's tensors are not what `config` asks for. Reads headers only."""
    expected = expected_tensors(source, config, mtp=mtp)
    missing, wrong, known = list(source.missing), list(source.problems), set(expected)
    for name, want in expected.items():
        have = source.tensors.get(name)
        if have is None:
            missing.append(name)
            continue
        if have.shape != want.shape:
            wrong.append(f"{name} has shape {list(have.shape)} instead of {list(want.shape)}")
        if have.dtype == FP8 and want.fp8:
            known.add(scale_name(name))
            _check_scales(source, name, want, missing, wrong)
        elif have.dtype not in FLOATS:
            floats = "F8_E4M3, BF16, F16 or F32" if want.fp8 else "BF16, F16 or F32"
            wrong.append(f"{name} has dtype {DTYPE_NAMES[have.dtype]} instead of {floats}")
    unexpected = [name for name in source.tensors if name not in known]
    _report(source, {"missing": missing, "unexpected": unexpected, "wrong": wrong})


def _check_scales(source: CanonicalSource, name: str, want: Expected, missing: list[str], wrong: list[str]) -> None:
    scale = scale_name(name)
    have, shape = source.tensors.get(scale), scale_shape(want.shape, halves(name))
    if have is None:
        missing.append(scale)
    elif have.shape != shape:
        wrong.append(f"{scale} has shape {list(have.shape)} instead of {list(shape)}")
    elif have.dtype not in FLOATS:
        wrong.append(f"{scale} has dtype {DTYPE_NAMES[have.dtype]} instead of BF16 or F32")


def _report(source: CanonicalSource, problems: dict[str, list[str]]) -> None:
    texts, room = [], LISTED
    for kind, items in problems.items():
        if items:
            shown = items[: max(room, 1)]
            more = f" and {len(items) - len(shown)} more" if len(items) > len(shown) else ""
            texts.append(f"{len(items)} {kind}: {', '.join(shown)}{more}")
            room -= len(shown)
    if texts:
        raise UserError(f"the tensors of {source.directory} do not fit its config.json: {'; '.join(texts)}")
