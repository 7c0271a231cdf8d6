"""Command line: text from a model, on any mesh. `python -m qwen35_jax.sample --help`."""

from __future__ import annotations

from qwen35_jax import command

if __name__ == "__main__":
    command.quiet_interrupts()

import contextlib
import itertools
import json
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator

import jax
from absl import flags
from etils import epath

from qwen35_jax import hosts
from qwen35_jax.chat import Chat
from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.errors import UserError, writable
from qwen35_jax.generate import LanguageModel, Piece, SamplingParams, load
from qwen35_jax.generate.multimodal import Prepared, content_with_pictures
from qwen35_jax.generate.sampling import LARGEST_SEED
from qwen35_jax.ops.forms import KERNEL_CHOICES
from qwen35_jax.ops.moe import MOE_CHOICES
from qwen35_jax.sharding import together
from qwen35_jax.text import SAMPLING_PRESETS, FilePrompt, read_prompts
from qwen35_jax.vision_io import Picture, VisionSettings, check_source, collect_pictures, is_folder

USAGE = """
Writes text with a Qwen3.5 model.

  python -m qwen35_jax.sample --mesh 8x1
  python -m qwen35_jax.sample --checkpoint DIR_OR_HUB_ID --mesh 1x8 --prompt "Why is the sky blue?"
"""

DEFAULT_PROMPT = "What is 37 + 58?"
DEFAULT_PROMPT_WITH_PICTURES = "What do you see?"


class _InOrder(flags.ArgumentParser):
    """Of several flags: each value with its number, so that they can be put in the order of the command line."""

    def __init__(self):
        self._numbers = itertools.count()

    def parse(self, argument: str) -> tuple[int, str]:
        return next(self._numbers), argument


IN_ORDER = _InOrder()

MESH = flags.DEFINE_string("mesh", "1x1", "DATAxMODEL or REPLICAxDATAxMODEL; without accelerators, virtual CPU devices")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "directory (Hugging Face or converted; local or gs://) or hub id")
REVISION = flags.DEFINE_string("revision", None, "revision of a hub id")
MODEL = flags.DEFINE_enum("model", None, PRESETS, "preset: tiny is the packaged model, the others are random weights")
RANDOM = flags.DEFINE_bool("random_weights", False, "random numbers in place of the stored weights")
PROMPT = flags.DEFINE_multi_string(
    "prompt",
    [],
    f'what to answer; repeat it for a batch; default: "{DEFAULT_PROMPT}", about pictures "{DEFAULT_PROMPT_WITH_PICTURES}"',
)
IMAGE = flags.DEFINE_multi(
    IN_ORDER,
    flags.ArgumentSerializer(),
    "image",
    [],
    "image file for the prompt, in place of its next <image>, or in front; repeatable, and in order with --video",
)
VIDEO = flags.DEFINE_multi(
    IN_ORDER,
    flags.ArgumentSerializer(),
    "video",
    [],
    "video file or folder of frames, in place of the next <video>, or in front; repeatable",
)
MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", None, "most pixels of an image, and of a video's frame; larger ones shrink", lower_bound=1
)
FPS = flags.DEFINE_float("fps", None, "frames of a video that are looked at, a second; default: as the checkpoint has it, or 2")
MAX_FRAMES = flags.DEFINE_integer("max_frames", None, "most frames of a video that are looked at; default: 768")
FRAME_RATE = flags.DEFINE_float("frame_rate", None, "frames a second of a --video FOLDER; default: 24", lower_bound=0.001)
REMOTE = flags.DEFINE_bool("allow_remote_media", False, "fetch https URLs of --image and --video: public hosts, no redirects")
PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, 'one prompt a line, or .jsonl with {"prompt": …} or {"messages": […], "tools": […]}'
)
CHAT = flags.DEFINE_bool("chat", False, "talk: reads lines from the terminal until /exit; /image FILE shows one")
SYSTEM = flags.DEFINE_string("system", None, "system message")
RAW = flags.DEFINE_bool("raw", False, "prompts are text to continue: no chat template")
THINK = flags.DEFINE_bool("think", None, "let the model think first, or not; default: as --preset or the chat template has it")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "most tokens of an answer, if the context holds them", lower_bound=1)
PRESET = flags.DEFINE_enum("preset", None, list(SAMPLING_PRESETS), "the model card's sampling settings by name")
STOP = flags.DEFINE_multi_string("stop", [], "text that ends an answer; repeatable")
SEED = flags.DEFINE_integer("seed", 0, "of sampling, and of random weights", lower_bound=0, upper_bound=LARGEST_SEED)
PREFILL_CHUNK = flags.DEFINE_integer("prefill_chunk", 2048, "prompt tokens read at once", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of weights and activations")
KEEP_FP8 = flags.DEFINE_bool("keep_fp8", False, "keep the weights of an FP8 checkpoint in FP8")
FP8_ACTIVATIONS = flags.DEFINE_bool("fp8_activations", False, "with --keep_fp8: multiply them with activations in FP8 too")
KERNELS = flags.DEFINE_enum("kernels", "auto", KERNEL_CHOICES, "forms of the ops; auto: the best; pallas: TPU and Hopper only")
MOE = flags.DEFINE_enum("moe", "auto", MOE_CHOICES, "how tokens and experts meet; auto: gather, or on TPU what moves fewer bytes")
FULLY_SHARDED = flags.DEFINE_bool(
    "fully_sharded", False, "cut the weights over the data axes too, and gather each unit's when it is computed"
)
CONTEXT_PARALLEL = flags.DEFINE_bool("context_parallel", False, "cut each sequence over `data`, for long prompts")
YARN = flags.DEFINE_float("yarn", None, "so many times the model's positions: 4 for prompts of a million tokens", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "one JSON object a prompt, when all are finished")
STATS = flags.DEFINE_bool("stats", False, "print times, speeds, op forms and bytes per device at the end")
PROFILE = flags.DEFINE_string("profile", None, "write a jax.profiler trace of the generation to this directory")
SAMPLING = {
    "temperature": flags.DEFINE_float("temperature", None, "0 is greedy; default: generation_config.json", lower_bound=0),
    "top_k": flags.DEFINE_integer("top_k", None, "draw from the k likeliest tokens; 0 is off", lower_bound=0),
    "top_p": flags.DEFINE_float("top_p", None, "draw from the fewest tokens of this total probability"),
    "min_p": flags.DEFINE_float("min_p", None, "leave out tokens below this part of the best one's probability"),
    "presence_penalty": flags.DEFINE_float("presence_penalty", None, "subtracted from tokens already in the answer"),
    "repetition_penalty": flags.DEFINE_float("repetition_penalty", None, "divides the logits of tokens already seen"),
}

hosts.declare_flags()


def main(arguments: list[str]) -> None:
    """Flags to options, one call, and the printing of what comes."""
    _check(arguments)
    prompts = [] if CHAT.value else _prompts()
    _check_pictures(prompts)
    if PROFILE.value is not None:
        _make_writable(PROFILE.value)
    with hosts.joined(MESH.value):
        _run(prompts)


def _run(prompts: list[FilePrompt]) -> None:
    with together():
        lm = load(
            _checkpoint() if CHECKPOINT.value is not None else MODEL.value or "tiny",
            MESH.value,
            DTYPE.value,
            revision=REVISION.value,
            keep_fp8=KEEP_FP8.value,
            fp8_activations=FP8_ACTIVATIONS.value,
            kernels=KERNELS.value,
            moe=MOE.value,
            fully_sharded=FULLY_SHARDED.value,
            seed=SEED.value,
            random_weights=RANDOM.value,
            context_parallel=CONTEXT_PARALLEL.value,
            yarn=YARN.value,
        )
    if lm.random_weights and hosts.is_first():
        print(f"note: {MODEL.value or 'tiny'} has random weights here; its text has no meaning", file=sys.stderr)
    options = _sampling() | {
        "max_new_tokens": MAX_NEW_TOKENS.value,
        "preset": PRESET.value,
        "seed": SEED.value,
        "stop": STOP.value,
        "prefill_chunk": PREFILL_CHUNK.value,
    }
    with jax.profiler.trace(PROFILE.value) if PROFILE.value is not None else contextlib.nullcontext():
        if CHAT.value:
            Chat(lm, SYSTEM.value, _picture, _rendering(), options).run()
        elif JSON.value:
            print_json(lm, prompts, options)
        else:
            print_streams(lm, prompts, options)
    if STATS.value and hosts.is_first():
        print_stats(lm.stats())


def _check(arguments: list[str]) -> None:
    """Flags that contradict each other are errors: nothing is parsed and ignored."""
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}: prompts go behind --prompt")
    for flag in (CHECKPOINT, REVISION, PROMPTS_FILE, PROFILE):
        if flag.value == "":
            raise UserError(f"--{flag.name} is empty: give it a value, or leave it out")
    exclusive = (
        (CHECKPOINT.value and MODEL.value, "--checkpoint and --model: give one of them"),
        (FP8_ACTIVATIONS.value and not KEEP_FP8.value, "--fp8_activations needs --keep_fp8"),
        (REVISION.value and not CHECKPOINT.value, "--revision belongs to --checkpoint"),
        (RANDOM.value and CHECKPOINT.value, "--random_weights goes with --model, not with --checkpoint"),
        (RAW.value and SYSTEM.value is not None, "--raw uses no chat template, so there is no place for --system"),
        (RAW.value and THINK.value is not None, "--raw uses no chat template, so --think and --nothink mean nothing"),
        (CHAT.value and (PROMPT.value or PROMPTS_FILE.value), "--chat reads prompts from the terminal: leave --prompt out"),
        (CHAT.value and (RAW.value or JSON.value), "--chat goes with neither --raw nor --json"),
        (_pictures() and RAW.value, "--image and --video go into a chat: they do not go with --raw"),
        (_pictures() and CHAT.value, "--chat takes pictures as they come: type /image FILE or /video FILE"),
        (
            _pictures() and PROMPTS_FILE.value,
            "--image and --video go with --prompt; in a .jsonl file pictures are parts of messages",
        ),
        (_pictures() and len(PROMPT.value) > 1, "--image and --video go with one --prompt"),
        (CHAT.value and hosts.COORDINATOR.value, "--chat reads one terminal: it does not go with --coordinator"),
    )
    for wrong, message in exclusive:
        if wrong:
            raise UserError(message)
    SamplingParams(**_sampling(), seed=SEED.value)  # complains now, not when the model is loaded


def _pictures() -> list[Picture]:
    """In the order of the command line."""
    numbered = [(number, _picture(flag.name, path)) for flag in (IMAGE, VIDEO) for number, path in flag.value]
    return [picture for _, picture in sorted(numbered, key=lambda pair: pair[0])]


def _picture(kind: str, source: str) -> Picture:
    folder = kind == "video" and FRAME_RATE.value is not None and is_folder(source)
    return Picture(kind, source, FRAME_RATE.value if folder else None)


def _check_pictures(prompts: list[FilePrompt]) -> None:
    """Looks at the prompts' pictures, and at the flags about them, for what can be wrong before a model is loaded."""
    _check_numbers()
    if CHAT.value:
        return
    pictures = []
    for where, prompt, _ in prompts:
        with _about(where):
            own = collect_pictures(prompt)[1]
            for picture in own:
                check_source(picture, REMOTE.value)
        pictures += own
    videos = [p for p in pictures if p.kind == "video"]
    if not pictures and (_vision() or FRAME_RATE.value is not None):
        names = "--max_pixels, --fps, --max_frames, --frame_rate and --allow_remote_media"
        raise UserError(f"{names} are for pictures, and there are none: give --image or --video, or messages with pictures")
    if not videos and (FPS.value is not None or MAX_FRAMES.value is not None):
        raise UserError("--fps and --max_frames are for videos, and there is none: give --video, or leave them out")
    if FRAME_RATE.value is not None and not any(is_folder(path) for _, path in VIDEO.value):
        raise UserError("--frame_rate is that of a folder of frames: give one behind --video; files know their own")


def _check_numbers() -> None:
    """--fps and --max_frames; and --max_pixels, where the model's patches are known: not of a hub id, and not in a bucket."""
    given, config = _vision(), None
    if CHECKPOINT.value is None:
        config = ModelConfig.preset(MODEL.value or "tiny")
    elif given and os.path.isfile(os.path.join(_checkpoint(), "config.json")):
        config = ModelConfig.from_hf(_checkpoint())
    if config is not None and config.vision is not None:
        VisionSettings.from_directory(None, config.vision).changed(**given)
    else:
        VisionSettings().changed(**{name: value for name, value in given.items() if name != "max_pixels"})


def _rendering() -> dict:
    return {"enable_thinking": THINK.value, "preset": PRESET.value} | _vision()


def _vision() -> dict:
    values = {"max_pixels": MAX_PIXELS.value, "fps": FPS.value, "max_frames": MAX_FRAMES.value}
    values["allow_remote_media"] = REMOTE.value or None
    return {name: value for name, value in values.items() if value is not None}


def _sampling() -> dict:
    return {name: flag.value for name, flag in SAMPLING.items() if flag.value is not None}


def _checkpoint() -> str:
    """What `load` is to open: there the name of a preset is no directory's, but behind --checkpoint it is."""
    return os.path.join(".", CHECKPOINT.value) if CHECKPOINT.value in PRESETS else CHECKPOINT.value


def _make_writable(directory: str) -> None:
    """Makes the directory of the trace, which is written last: what is wrong with it is to be known first."""
    if "://" in directory:  # the profiler writes to gs:// by itself
        probe = epath.Path(directory) / f"writable-{uuid.uuid4().hex}"  # hosts do not meet there
        with writable(directory):
            probe.write_bytes(b"")
            probe.unlink()
        return
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"--profile {directory} cannot be written to: {error.strerror or error}") from error


def _prompts() -> list[FilePrompt]:
    """Those of the command line, and of the file. Text is put into a chat, but with --raw."""
    placed = [FilePrompt("", text) for text in PROMPT.value]
    if any(not text.strip() for text in PROMPT.value):
        raise UserError("a prompt is empty: write something after --prompt")
    if PROMPTS_FILE.value is not None:
        placed += read_prompts(PROMPTS_FILE.value)
    placed = placed or [FilePrompt("", DEFAULT_PROMPT_WITH_PICTURES if _pictures() else DEFAULT_PROMPT)]
    if RAW.value:
        for where, prompt, _ in placed:
            if not isinstance(prompt, str):
                raise UserError(f"{where} has messages, but --raw takes text")
        return placed
    system = [] if SYSTEM.value is None else [{"role": "system", "content": SYSTEM.value}]
    return [each._replace(prompt=system + (_message(p) if isinstance(p := each.prompt, str) else p)) for each in placed]


def _message(text: str) -> list[dict]:
    return [{"role": "user", "content": content_with_pictures(text, _pictures())}]


def _prepare(lm: LanguageModel, prompts: list[FilePrompt]) -> list[Prepared]:
    """Token ids and patches; UserError names the place of a prompt that cannot be used."""
    ready = []
    for where, prompt, tools in prompts:
        with _about(where):
            ready.append(lm.prepare(prompt, tools=tools, **_rendering()))
    return ready


@contextlib.contextmanager
def _about(where: str) -> Iterator[None]:
    """Puts the place of a prompt, if it has one, in front of what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error


def print_json(lm: LanguageModel, prompts: list, options: dict) -> None:
    """One JSON object a line, in the order of the prompts."""
    completions = lm.generate(_prepare(lm, prompts), **options)
    for each, done in zip(prompts, completions, strict=True):
        record = {
            "prompt": each.prompt,
            "text": done.text,
            "finish_reason": done.finish_reason,
            "prompt_tokens": len(done.prompt_token_ids),
            "token_ids": done.token_ids,
        }
        print(json.dumps(record, ensure_ascii=False), flush=True)


def print_streams(lm: LanguageModel, prompts: list, options: dict) -> None:
    """Text as it comes: the first unfinished prompt streams, the others wait behind it."""
    if lm.tokenizer is None:
        raise UserError("this checkpoint has no tokenizer.json: use the Python interface with token ids")
    waiting = [""] * len(prompts)
    finished = [False] * len(prompts)
    current = -1
    for piece in _with_start(lm.stream(_prepare(lm, prompts), **options)):
        waiting[piece.index] += piece.text
        finished[piece.index] |= piece.finish_reason is not None
        while current < len(prompts) and (current < 0 or finished[current]):
            if current >= 0:
                _write(waiting[current] + "\n")
            current += 1
            if current < len(prompts) and len(prompts) > 1:
                _write(f"--- {current + 1} of {len(prompts)}: {_title(prompts[current].prompt)}\n")
        if current < len(prompts):
            _write(waiting[current])
            waiting[current] = ""


def _with_start(pieces: Iterator[Piece]) -> Iterator[Piece]:
    yield Piece(0, "", [])
    yield from pieces


def _title(prompt) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1].get("content")
    if isinstance(text, list):
        text = " ".join(str(part.get("text", f"<{part.get('type')}>")) for part in text)
    text = str(text)
    return " ".join(text.split())[:60]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def print_stats(stats: dict) -> None:
    """The numbers of `LanguageModel.stats`, a line each, to stderr."""
    speed = stats["decode_tokens_per_second"]
    rows = [
        ("load", f"{stats['load_seconds']:.2f} s"),
        ("compile", f"{stats['compile_seconds']:.2f} s"),
        *([("vision", f"{stats['vision_seconds']:.3f} s")] if stats["vision_seconds"] else []),
        ("prefill", f"{stats['prefill_seconds']:.3f} s for {stats['prefill_tokens']} tokens"),
        ("decode", "nothing" if speed is None else f"{speed:.1f} tokens/s"),
        ("ops", ", ".join(f"{op}={form}" for op, form in stats["forms"].items())),
        ("weights per device", f"{stats['weight_bytes_per_device']:,} bytes"),
        ("state per device", f"{stats['state_bytes_per_device']:,} bytes"),
    ]
    for name, value in rows:
        print(f"{name + ':':20}{value}", file=sys.stderr)


if __name__ == "__main__":
    command.run(main, USAGE)
