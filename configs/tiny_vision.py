"""The packaged model's third run: it learns to see, with a small tower of its own, and keeps its text.

    python -m scripts.tiny_tower --source runs/tiny_more_hf --out runs/tiny_tower_hf
    python -m scripts.tiny_pictures --out runs/tiny_vision_data --size 240000
    python -m qwen35_jax.train --config configs/tiny_vision.py --workdir runs/tiny_vision --export_hf runs/tiny_vision_hf
    python -m benchmarks.tiny_skills --checkpoint runs/tiny_vision_hf

It begins where configs/tiny.py and configs/tiny_more.py ended, in runs/tiny_more_hf, whose text model the first command gives a
tower that tells answers apart. How large pictures are looked at is said beside the tokenizer, in qwen35_jax/assets/tiny.
Hardware: two CPU cores, or a mesh of one or two data shards. Result: that of a shorter run is in docs/vision.md; not packaged.
"""

from ml_collections import ConfigDict

from qwen35_jax.train.config import default_config


def get_config() -> ConfigDict:
    """See the top of the file."""
    c = default_config()
    c.model.source = "runs/tiny_tower_hf"
    c.dtype, c.remat = "float32", "none"
    c.data.train, c.data.eval = ("runs/tiny_vision_data/train.jsonl",), ("runs/tiny_vision_data/eval.jsonl",)
    c.data.sequence_length, c.data.batch_size = 768, 4
    c.data.patches, c.data.patch_rows = 896, 2
    c.steps = 6000
    c.loss.balance = 0.005
    c.optimizer.name, c.optimizer.learning_rate, c.optimizer.muon_learning_rate = "muon", 1e-3, 2.5e-3
    c.optimizer.schedule, c.optimizer.decay_fraction, c.optimizer.final_fraction = "wsd", 0.6, 0.02
    c.eval_every, c.checkpoint.every = 200, 100
    return c
