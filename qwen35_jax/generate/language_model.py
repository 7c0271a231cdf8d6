"""`load` and `LanguageModel`: the Python door to a model with its weights, tokenizer and chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.generate import steps
from qwen35_jax.generate.generation import Generation, Programs, Request, Timing, cut_length, prompt_buckets, slot_bucket
from qwen35_jax.generate.multimodal import (
    VISION_OPTIONS,
    Prepared,
    Vision,
    as_pictures,
    place_rows,
    step_arrays,
)
from qwen35_jax.generate.sampling import SamplingParams
from qwen35_jax.model import Model
from qwen35_jax.text import (
    ChatTemplate,
    GenerationConfig,
    StopStrings,
    StreamDecoder,
    Tokenizer,
    sampling_preset,
)
from qwen35_jax.vision_io import Picture, Visual, check_tokens, collect_pictures, expand

Prompt = str | Sequence[int] | Sequence[dict[str, Any]] | Prepared
PROMPT_FORMS = "a string, a list of token ids (whole numbers) or a list of messages"


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer. `token_ids` includes the end token; `text` neither it nor a stop string. finish_reason: stop | length."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Piece:
    """New text (perhaps "") and tokens of prompt `index`; `finish_reason` is set on the last piece."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None


class LanguageModel:
    """A loaded model. Made by `qwen35_jax.load`; `params` is the parameter tree on the devices."""

    def __init__(
        self,
        model: Model,
        params: dict,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        defaults: GenerationConfig | None = None,
        *,
        vision: Vision | None = None,
        random_weights: bool = False,
        load_seconds: float = 0.0,
    ):
        self.model, self.params, self.tokenizer, self.template = model, params, tokenizer, template
        self.defaults = defaults or GenerationConfig()
        self.vision = vision
        self.random_weights, self.load_seconds = random_weights, load_seconds
        self.config: ModelConfig = model.config
        self.vocabulary = min(tokenizer.vocab_size, self.config.vocab_size) if tokenizer else self.config.vocab_size
        self.programs = Programs(model, params, self.vocabulary)
        self.timing = Timing()
        self.state_bytes = 0
        self.step_tokens: dict[str, int] = {}

    def logits(
        self, token_ids, *, segment_ids=None, layers: bool = False, images: Sequence = (), videos: Sequence = (), **vision_options
    ):
        """Next-token logits.

        Args:
            token_ids: int [B, T], with the placeholders of all images and videos.
            segment_ids: int [B, T], non-decreasing, 0 = padding at the end: packed documents, each its own. Default: all 1.
            layers: also return the residual stream after the embedding and after each layer.
            images: what the image placeholders show, in order over all rows: uint8 [H, W, 3], or whatever `read_image` takes.
            videos: the same of videos: (uint8 [T, H, W, 3], fps of it), or whatever `read_video` takes.
            vision_options: max_pixels, fps, max_frames, allow_remote_media; see `stream`.

        Returns float32 [B, T, vocab_size] (with `layers`: and [layers + 1, B, T, D]).
        """
        tokens, segments = self._checked(token_ids, segment_ids)
        visuals = self._read(as_pictures(images, videos), vision_options)
        (b, t), shards = tokens.shape, self.model.sharding.batch
        rows, length = slot_bucket(b, shards), cut_length(sum(prompt_buckets(t, 4096)), self.model.sharding.size("T"))
        pad = ((0, rows - b), (0, length - t))
        more = ()
        if visuals:
            placed = place_rows(tokens, segments, visuals, self.vision.encode(visuals), self.config)
            more = (step_arrays(placed, rows, 0, length, self.config),)
        options = {"layers": layers} | ({"vision": True} if visuals else {})
        program = self.programs.get(steps.make_logits, rows, length, **options)
        result = program(self.params, np.pad(tokens, pad), np.pad(segments, pad), *more)
        if layers:
            return result[0][:b, :t], result[1][:, :b, :t]
        return result[:b, :t]

    def _checked(self, token_ids, segment_ids) -> tuple[np.ndarray, np.ndarray]:
        """Arguments of `logits` as arrays."""
        try:
            tokens = np.asarray(token_ids)
        except ValueError as error:
            raise UserError(
                "token_ids must be [B, T]: rows of one length; fill them up and say where with segment_ids"
            ) from error
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or 0 in tokens.shape:
            raise UserError(f"token_ids must be whole numbers of shape [B, T], not {tokens.dtype} {list(tokens.shape)}")
        self._check_ids(tokens)
        try:
            segments = np.ones_like(tokens) if segment_ids is None else np.asarray(segment_ids)
        except ValueError as error:
            raise UserError("segment_ids must be [B, T]: rows of one length") from error
        if segments.shape != tokens.shape:
            raise UserError(f"segment_ids {list(segments.shape)} and token_ids {list(tokens.shape)} must have one shape")
        if not np.issubdtype(segments.dtype, np.integer) and segments.dtype != bool:
            raise UserError(f"segment_ids must be whole numbers, not {segments.dtype}")
        segments = segments.astype(np.int64)
        real = np.where(segments > 0, segments, np.iinfo(segments.dtype).max)
        if segments.min() < 0 or (np.diff(real, axis=1) < 0).any():
            raise UserError("segment_ids must not fall along a row; 0 marks the padding at its end")
        return tokens, segments

    def generate(self, prompts: Prompt | Sequence[Prompt], **options) -> list[Completion]:
        """Completions of `prompts`: strings (raw text), lists of token ids, chats (lists of role/content dicts), or what
        `prepare` made of one.

        A chat's content may be a list of parts with images and videos among them (see `collect_pictures`). Options are those
        of `stream`.
        """
        chosen = _as_list(prompts)
        _check_template_options(chosen, options)
        ready = [self.prepare(p, **_template_options(options)) for p in chosen]
        texts, tokens, reasons = [""] * len(ready), [[] for _ in ready], ["length"] * len(ready)
        for piece in self._run(ready, streaming=False, **_without_template_options(options)):
            texts[piece.index] += piece.text
            tokens[piece.index] += piece.token_ids
            reasons[piece.index] = piece.finish_reason or reasons[piece.index]
        ids = [p.token_ids for p in ready]
        return [Completion(*parts) for parts in zip(ids, tokens, texts, reasons, strict=True)]

    def stream(self, prompts: Prompt | Sequence[Prompt], **options) -> Iterator[Piece]:
        """Like `generate`, but yields text as it comes.

        Options: max_new_tokens (fewer where the context ends first); preset (a name of the model card's settings) and
        temperature, top_k, top_p, min_p, presence_penalty, repetition_penalty over the checkpoint's defaults; seed (one, or
        one a prompt); stop (strings); ignore_eos; prefill_chunk (tokens read at once); for chats tools and enable_thinking
        (default: as the preset has it, or else the template), and for their pictures max_pixels (of an image, and of a
        video's frame), fps and max_frames (how many frames of a video are looked at), allow_remote_media (whether https URLs
        are fetched: from public addresses, without redirects).
        """
        chosen = _as_list(prompts)
        _check_template_options(chosen, options)
        ready = [self.prepare(p, **_template_options(options)) for p in chosen]
        return self._run(ready, streaming=True, **_without_template_options(options))

    def encode(self, prompt: Prompt, **options) -> list[int]:
        """Token ids of a prompt: text as it is, ids checked, chats through the chat template (options: see `prepare`)."""
        return self.prepare(prompt, **options).token_ids

    def prepare(
        self, prompt: Prompt, *, enable_thinking: bool | None = None, tools=None, preset: str | None = None, **vision_options
    ) -> Prepared:
        """A prompt as token ids and patches, as `generate` and `stream` take it too: what they do first, and where errors in it
        are found. Options: see `stream`."""
        if isinstance(prompt, Prepared):
            return prompt
        if enable_thinking is None and preset is not None:
            enable_thinking = sampling_preset(preset).enable_thinking
        if isinstance(prompt, np.ndarray):
            prompt = prompt.tolist()
        if not isinstance(prompt, str | list | tuple):
            raise UserError(f"a prompt must be {PROMPT_FORMS}, not {type(prompt).__name__}")
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], dict)):
            if self.tokenizer is None:
                raise UserError("this checkpoint has no tokenizer.json: pass prompts as lists of token ids")
            prompt, pictures = collect_pictures(prompt)
            visuals = self._read(pictures, vision_options)
            if not isinstance(prompt, str):
                prompt = self.template.render(prompt, enable_thinking=enable_thinking, tools=tools)
            if self.vision is not None:
                prompt = expand(prompt, visuals)
            ids = self.tokenizer.encode(prompt)
            check_tokens(ids, visuals, self.config)
        else:
            visuals = []
            if not all(isinstance(i, int | np.integer) for i in prompt):
                raise UserError(f"a prompt must be {PROMPT_FORMS}")
            ids = [int(i) for i in prompt]
        if not ids:
            raise UserError("a prompt is empty: give it at least one token")
        self._check_ids(np.asarray(ids))
        if len(ids) >= self.config.context_length:
            raise UserError(
                f"a prompt has {len(ids)} tokens, but the context is {self.config.context_length}, "
                "including at least one new token: shorten it, or stretch the context (yarn)"
                + (", or give fewer or smaller pictures (max_pixels, max_frames)" if visuals else "")
            )
        return Prepared(ids, tuple(visuals))

    def _read(self, pictures: list[Picture], options: dict) -> list[Visual]:
        """The pictures, resized and cut. UserError where the model cannot see, and for whatever is wrong with one of them."""
        unknown = set(options) - set(VISION_OPTIONS)
        if unknown:
            raise TypeError(f"unknown options {sorted(unknown)}; for pictures there are {list(VISION_OPTIONS)}")
        if pictures and self.vision is None:
            raise UserError("this model has no vision tower: it cannot be given images or videos")
        return self.vision.read(pictures, **options) if pictures else []

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise UserError(f"token id {bad} is not in the vocabulary (0 to {self.config.vocab_size - 1})")

    def _run(
        self,
        prompts: list[Prepared],
        *,
        streaming: bool,
        max_new_tokens: int = 256,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        prefill_chunk: int = 2048,
        preset: str | None = None,
        **sampling,
    ) -> Iterator[Piece]:
        for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
            if not isinstance(value, int | np.integer) or value < 1:
                raise UserError(f"{name} is {value}; it must be a whole number, 1 or more")
        if stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this checkpoint has no tokenizer.json")
        seeds = [seed] * len(prompts) if np.ndim(seed) == 0 else list(seed)
        if not all(isinstance(s, int | np.integer) for s in seeds):
            raise UserError(f"seed is {seed}; it must be a whole number, or one for each prompt")
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one, or one a prompt")
        settings = self.sampling(preset, **sampling)
        ends = () if ignore_eos else self.defaults.eos_token_ids
        context = self.config.context_length
        placed = [None] * len(prompts) if self.vision is None else self.vision.place(prompts)
        requests = [
            Request(ids, min(max_new_tokens, context - len(ids)), dataclasses.replace(settings, seed=int(s)), ends, own)
            for ids, s, own in zip((p.token_ids for p in prompts), seeds, placed, strict=True)
        ]
        generation = Generation(self.programs, requests, prefill_chunk)
        readers = [_RowReader(self.tokenizer, r, StopStrings(stop)) for r in requests]
        self.timing = generation.timing
        self.timing.vision_seconds = self.vision.encoder.seconds if self.vision else 0.0
        self.step_tokens = {"prefill": max(generation.chunks) * generation.slots, "decode": generation.slots}
        self.state_bytes = _bytes_per_device(generation.session_shapes()["state"])
        yield from self._pieces(generation, readers, streaming or bool(stop))

    @staticmethod
    def _pieces(generation: Generation, readers: list[_RowReader], streaming: bool) -> Iterator[Piece]:
        blocks = generation.prefill()
        while True:
            for row, tokens in blocks:
                piece = readers[row].read(row, tokens)
                if piece.finish_reason and generation.alive[row]:
                    generation.stop(row)
                yield piece
            if generation.finished:
                return
            blocks = generation.decode(streaming)

    def sampling(self, preset: str | None = None, **overrides) -> SamplingParams:
        """Sampling parameters: the checkpoint's defaults, then the preset's, then `overrides` that are not None.

        Where the checkpoint's default is greedy it stays so unless a temperature, or a top_k, top_p or min_p that is not off,
        asks for drawing.
        """
        names = [f.name for f in dataclasses.fields(SamplingParams) if f.name != "seed"]
        unknown = set(overrides) - set(names)
        if unknown:
            raise TypeError(f"unknown options {sorted(unknown)}; sampling options are {names}")
        base = self.defaults if preset is None else sampling_preset(preset)
        values = {name: getattr(base, name) for name in names}
        off = {"top_k": 0, "top_p": 1, "min_p": 0}
        draws = any(overrides.get(name) not in (None, value) for name, value in off.items())
        if preset is None and not self.defaults.do_sample and not draws:
            values["temperature"] = 0.0
        return SamplingParams(**(values | {k: v for k, v in overrides.items() if v is not None}))

    def stats(self) -> dict[str, Any]:
        """Seconds, speeds, op forms and bytes of the last batch; no forms before the first."""
        t, tower = self.timing, self.vision and self.vision.encoder
        return {
            "load_seconds": self.load_seconds + (tower.load_seconds if tower else 0.0),
            "compile_seconds": self.programs.seconds + (tower.compile_seconds if tower else 0.0),
            "vision_seconds": t.vision_seconds,
            "prefill_seconds": t.prefill_seconds,
            "prefill_tokens": t.prefill_tokens,
            "decode_tokens_per_second": t.decode_tokens / t.decode_seconds if t.decode_seconds else None,
            "forms": self._forms(),
            "weight_bytes_per_device": _bytes_per_device((self.params, tower and tower.params)),
            "state_bytes_per_device": self.state_bytes,
        }

    def _forms(self) -> dict[str, str]:
        """The form of each op that the last batch's steps had, with both where prefill and decode differ."""
        models = {"prefill": self.model, "decode": self.model.for_one_token()}
        steps = {step: models[step].generation_forms(tokens) for step, tokens in self.step_tokens.items()}
        found = {}
        for op in next(iter(steps.values()), {}):
            forms = {step: by_op[op] for step, by_op in steps.items()}
            same = len(set(forms.values())) == 1
            found[op] = forms["prefill"] if same else " and ".join(f"{form} ({step})" for step, form in forms.items())
        if self.vision is None:
            found.pop("vision_attention", None)
        return found


class _RowReader:
    """Turns one row's tokens into text, and knows when the row has ended."""

    def __init__(self, tokenizer: Tokenizer | None, request: Request, stops: StopStrings):
        self.request, self.stops, self.count = request, stops, 0
        self.decoder = StreamDecoder(tokenizer) if tokenizer else None
        self.finished = False

    def read(self, row: int, tokens: list[int]) -> Piece:
        text, taken, reason = "", [], None
        for token in tokens:
            if self.finished:
                break
            taken.append(token)
            self.count += 1
            if token in self.request.end_tokens:
                reason = "stop"
            elif self.decoder:
                text += self.stops.push(self.decoder.push(token))
                reason = "stop" if self.stops.matched else None
            if reason is None and self.count >= self.request.max_new_tokens:
                reason = "length"
            if reason:
                self.finished = True
                if self.decoder:
                    text += self.stops.push(self.decoder.finish()) + self.stops.finish()
        return Piece(row, text, taken, reason)


def _bytes_per_device(tree: Any) -> int:
    def size(x) -> int:
        return int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def _as_list(prompts) -> list:
    """The prompts, where one may stand alone."""
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if not isinstance(prompts, str | list | tuple | Prepared):
        raise UserError(f"prompts must be {PROMPT_FORMS}, or a list of such; not {type(prompts).__name__}")
    if isinstance(prompts, Prepared):
        return [prompts]
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer, dict)))
    return [prompts] if single else list(prompts)


def _check_template_options(prompts: list, options: dict) -> None:
    chats = any(isinstance(p, list | tuple) and p and isinstance(p[0], dict) for p in prompts)
    for name in ("enable_thinking", "tools", *VISION_OPTIONS):
        if options.get(name) is not None and not chats:
            raise UserError(f"{name} is for chats (lists of messages), and there is none among the prompts")


def _template_options(options: dict) -> dict:
    return {name: options[name] for name in ("enable_thinking", "tools", "preset", *VISION_OPTIONS) if name in options}


def _without_template_options(options: dict) -> dict:
    return {name: value for name, value in options.items() if name not in ("enable_thinking", "tools", *VISION_OPTIONS)}
