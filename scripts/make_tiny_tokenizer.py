"""Makes the text files of the packaged tiny model: tokenizer, chat template, sampling defaults.

    python scripts/make_tiny_tokenizer.py [--out qwen35_jax/assets/tiny]

The tokenizer is built like Qwen3.5's (NFC, the same pre-tokenisation, byte-level BPE, the same 33 added tokens with the
same flags at the end), but with 4,063 base tokens instead of 248,044, trained on text that `tiny_corpus.py` generates.
Running it twice gives the same bytes.
"""

import argparse
import json
from pathlib import Path

import tiny_corpus
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwen35_jax.text import built_in_template

TOTAL = 4096
PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In Qwen3.5's order. `decode(skip_special_tokens=True)` keeps the plain ones.
SPECIAL_BEFORE = """
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|>
<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
""".split()
PLAIN = """
<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
<tool_response> </tool_response> <think> </think>
""".split()
SPECIAL_AFTER = """
<|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single> <|audio_pad|>
""".split()
ROLES_OF_TOKENS = {
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
    "audio_token": "<|audio_pad|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}


def added_tokens() -> list[AddedToken]:
    plain = set(PLAIN)
    names = [*SPECIAL_BEFORE, *PLAIN, *SPECIAL_AFTER]
    return [AddedToken(name, special=name not in plain, normalized=False) for name in names]


def train() -> Tokenizer:
    added = added_tokens()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=TOTAL - len(added),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_corpus.corpus(), trainer)
    for token in added:  # one by one: the order decides the ids
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    if tokenizer.get_vocab_size() != TOTAL:
        raise SystemExit(f"error: {tokenizer.get_vocab_size()} tokens instead of {TOTAL}; the corpus has too few words")
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    decoder = {str(i): {f: getattr(t, f) for f in flags} for i, t in sorted(tokenizer.get_added_tokens_decoder().items())}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": SPECIAL_BEFORE[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": ROLES_OF_TOKENS,
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "pretokenize_regex": PRETOKENIZE_REGEX,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def generation_config(tokenizer: Tokenizer) -> dict:
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    return {
        "bos_token_id": pad,
        "do_sample": False,
        "eos_token_id": [end, pad],
        "pad_token_id": pad,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[1] / "qwen35_jax" / "assets" / "tiny"
    parser.add_argument("--out", type=Path, default=default, help="directory to write to (default: %(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    texts = {
        "tokenizer.json": tokenizer.to_str(pretty=False) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer_config(tokenizer), indent=2) + "\n",
        "generation_config.json": json.dumps(generation_config(tokenizer), indent=2) + "\n",
        "chat_template.jinja": built_in_template(thinking_by_default=False),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
