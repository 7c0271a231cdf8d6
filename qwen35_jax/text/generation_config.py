"""How a checkpoint wants to be sampled: generation_config.json, and the model card's settings by name."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from etils import epath

from qwen35_jax.errors import UserError
from qwen35_jax.text import files

LARGEST_ID = 2**31 - 1  # token ids are int32 on the devices, and so is top_k
LARGEST_FACTOR = 1_000_000  # of temperature and penalties: beyond any use, and far from what float32 cannot hold


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Sampling settings. The defaults are those of a checkpoint that says nothing: greedy, and every filter off.

    `do_sample` False means the most likely token, whatever the temperature here. `top_k` 0, `top_p` 1, `min_p` 0,
    `presence_penalty` 0 and `repetition_penalty` 1 switch the filter or penalty off.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None


@dataclasses.dataclass(frozen=True)
class SamplingPreset:
    """One row of the model card's table of recommended settings. `enable_thinking` is the mode the row is meant for:
    chats are rendered so unless the caller says otherwise."""

    enable_thinking: bool
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    repetition_penalty: float


SAMPLING_PRESETS: Mapping[str, SamplingPreset] = types.MappingProxyType(
    {
        #                             thinks temp  top_p top_k min_p presence repetition
        "thinking": SamplingPreset(True, 1.0, 0.95, 20, 0.0, 1.5, 1.0),  # thinking, general
        "coding": SamplingPreset(True, 0.6, 0.95, 20, 0.0, 0.0, 1.0),  # thinking, precise coding
        "instruct": SamplingPreset(False, 0.7, 0.8, 20, 0.0, 1.5, 1.0),  # no thinking, general
        "reasoning": SamplingPreset(False, 1.0, 1.0, 40, 0.0, 2.0, 1.0),  # no thinking, reasoning tasks
        "small": SamplingPreset(False, 1.0, 1.0, 20, 0.0, 2.0, 1.0),  # 0.8B and 2B, no thinking, text
    }
)


def sampling_preset(name: str) -> SamplingPreset:
    """The preset of that name. Raises UserError that lists the names."""
    if name not in SAMPLING_PRESETS:
        raise UserError(f"sampling preset {name!r} is unknown; there are {', '.join(SAMPLING_PRESETS)}")
    return SAMPLING_PRESETS[name]


def read_generation_config(directory: epath.PathLike) -> GenerationConfig:
    """The settings in `directory/generation_config.json`; the defaults where the file or a field is absent or null.

    Fields that are not about sampling are ignored. Raises UserError naming the file, the field and the value where a
    value has the wrong type or range.
    """
    raw = files.read_json_object(directory, "generation_config.json")
    if raw is None:
        return GenerationConfig()
    path = epath.Path(directory) / "generation_config.json"
    values = {name: _checked(path, name, raw[name]) for name in _ACCEPTED if raw.get(name) is not None}
    if raw.get("eos_token_id") is not None:
        values["eos_token_ids"] = _token_ids(path, raw["eos_token_id"])
    return GenerationConfig(**values)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_int(value) and 0 <= value <= LARGEST_ID


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= LARGEST_FACTOR  # NaN is not


# field -> (what is accepted, in words; the test)
_ACCEPTED = types.MappingProxyType(
    {
        "do_sample": ("true or false", lambda v: isinstance(v, bool)),
        "temperature": (f"a number from 0 to {LARGEST_FACTOR}", lambda v: _is_number(v) and v >= 0),
        "top_k": (f"a whole number from 0 to {LARGEST_ID}", _is_id),
        "top_p": ("a number above 0, at most 1", lambda v: _is_number(v) and 0 < v <= 1),
        "min_p": ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
        "presence_penalty": (f"a number from -{LARGEST_FACTOR} to {LARGEST_FACTOR}", _is_number),
        "repetition_penalty": (f"a number above 0, at most {LARGEST_FACTOR}", lambda v: _is_number(v) and v > 0),
        "pad_token_id": ("a token id", _is_id),
        "bos_token_id": ("a token id", _is_id),
    }
)


def _checked(path: epath.Path, name: str, value: Any) -> Any:
    words, accepts = _ACCEPTED[name]
    if not accepts(value):
        raise UserError(f"{path}: {name} is {value!r}, but {words} is expected")
    return value


def _token_ids(path: epath.Path, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not all(map(_is_id, ids)):
        raise UserError(f"{path}: eos_token_id is {value!r}, but a token id or a list of them is expected")
    return tuple(ids)
