"""The packaged model's third run, in five parts: it learns to see, with a small tower of its own, and gets its text back.

    python -m scripts.tiny_tower --source runs/tiny_more_hf --out runs/tiny_tower_hf
    python -m scripts.tiny_pictures --out runs/tiny_places_data --first --size 30000 --text 0.2
    python -m scripts.tiny_pictures --out runs/tiny_pictures_data --seed 3 --size 80000 --text 0.2
    python -m scripts.tiny_pictures --out runs/tiny_mixture_data --size 80000 --text 0.6
    python -m scripts.tiny_pictures --out runs/tiny_text_data --seed 4 --size 80000 --text 0.75 --mixture fourth
    python -m scripts.tiny_pictures --out runs/tiny_towns_data --seed 4 --size 80000 --text 0.75 --mixture fifth
    python -m qwen35_jax.train --config configs/tiny_vision.py:places --workdir runs/tiny_places --export_hf runs/tiny_places_hf
    python -m qwen35_jax.train --config configs/tiny_vision.py:pictures --workdir runs/tiny_shown --export_hf runs/tiny_shown_hf
    python -m qwen35_jax.train --config configs/tiny_vision.py:mixture --workdir runs/tiny_mixed --export_hf runs/tiny_mixed_hf
    python -m qwen35_jax.train --config configs/tiny_vision.py:text --workdir runs/tiny_text --export_hf runs/tiny_text_hf
    python -m qwen35_jax.train --config configs/tiny_vision.py:towns --workdir runs/tiny_towns --export_hf runs/tiny_towns_hf
    python -m scripts.tiny_average runs/tiny_{text,towns,mixed}_hf --shares 0.5 0.2 0.3 --out runs/tiny_average_hf
    python -m benchmarks.tiny_skills --checkpoint runs/tiny_average_hf

The first command gives the text model where configs/tiny_more.py ended, in runs/tiny_more_hf, a tower that tells answers apart;
it stays as it is. `places`: what is hard to find in its rows, and next to only that; along with all the rest it was learned in
one run of two. `pictures`: all kinds, and a little text. `mixture`: three fifths of the lines text, with learning rates that fall
nearly all along. From there `text` and `towns`: three quarters text, with towns of two words that no list has, in the second more
of them; and their average with the weights that both began with. How large pictures are looked at is said beside the tokenizer,
in qwen35_jax/assets/tiny.
Hardware: two CPU cores, or a mesh of one or two data shards. On two cores of an Intel Xeon that did other work too the first four
took 8, 36, 73 and 72 minutes, on two of an AMD EPYC with other work the last 52; their last evaluation losses are 0.247, 0.180,
0.174, 0.188 and 0.165, each of its own mixture. With `--cases 128` the last command prints the table of docs/vision.md, where is
said how the tower was made that they began with.
"""

from ml_collections import ConfigDict

from qwen35_jax.train.config import default_config


def get_config(part: str = "towns") -> ConfigDict:
    """See the top of the file."""
    if part not in PARTS:
        raise ValueError(f"configs/tiny_vision.py:{part}: the parts are {', '.join(PARTS)}")
    c = default_config()
    c.dtype, c.remat = "float32", "none"
    c.data.sequence_length, c.data.batch_size, c.data.patches, c.data.patch_rows = 768, 4, 896, 2
    c.loss.balance, c.freeze = 0.005, ("^vision",)
    c.optimizer.name, c.eval_every, c.checkpoint.every = "muon", 200, 100
    PARTS[part](c)
    return c


def _data(c: ConfigDict, directory: str) -> None:
    c.data.train, c.data.eval = (f"{directory}/train.jsonl",), (f"{directory}/eval.jsonl",)


def _rates(c: ConfigDict, rate: float, falls: bool) -> None:
    c.optimizer.learning_rate, c.optimizer.muon_learning_rate, c.optimizer.warmup_steps = rate, 2.5 * rate, 50
    c.optimizer.schedule = "wsd" if falls else "constant"
    if falls:
        c.optimizer.decay_fraction, c.optimizer.final_fraction = 0.9, 0.02


def _places(c: ConfigDict) -> None:
    c.model.source, c.steps = "runs/tiny_tower_hf", 320
    _data(c, "runs/tiny_places_data")
    c.data.patch_rows = 4  # questions are short: more pictures find room
    _rates(c, 6e-4, falls=False)


def _pictures(c: ConfigDict) -> None:
    c.model.source, c.steps = "runs/tiny_places_hf", 1200
    _data(c, "runs/tiny_pictures_data")
    c.data.patch_rows, c.loss.mtp = 4, 0.0
    _rates(c, 8e-4, falls=False)


def _mixture(c: ConfigDict) -> None:
    c.model.source, c.steps = "runs/tiny_shown_hf", 2500
    _data(c, "runs/tiny_mixture_data")
    _rates(c, 8e-4, falls=True)


def _text(c: ConfigDict) -> None:
    c.model.source, c.steps = "runs/tiny_mixed_hf", 2400
    _data(c, "runs/tiny_text_data")
    _rates(c, 8e-4, falls=True)


def _towns(c: ConfigDict) -> None:
    _text(c)
    _data(c, "runs/tiny_towns_data")


PARTS = {"places": _places, "pictures": _pictures, "mixture": _mixture, "text": _text, "towns": _towns}
