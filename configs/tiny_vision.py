"""The packaged model's third run: it learns to see, with a small tower of its own, and keeps its text.

    python -m scripts.tiny_pictures --out runs/tiny_vision_data
    python -m qwen35_jax.train --config configs/tiny_vision.py --workdir runs/tiny_vision --export_hf runs/tiny_vision_hf
    python -m benchmarks.tiny_skills --checkpoint runs/tiny_vision_hf

It begins where configs/tiny.py and configs/tiny_more.py ended, in runs/tiny_more_hf; as long as the packaged model has no tower,
`--config.model.source=tiny` begins from that. The tower has random weights. How large pictures are looked at is said beside the
tokenizer, in qwen35_jax/assets/tiny. Hardware: two CPU cores (2.4 hours beside other work), or a mesh of one or two data
shards. Result: it tells colours, not yet shapes, digits or directions (docs/vision.md), and is not packaged.
"""

from ml_collections import ConfigDict

from qwen35_jax.train.config import default_config


def get_config() -> ConfigDict:
    """See the top of the file."""
    c = default_config()
    c.model.source, c.model.tokenizer = "runs/tiny_more_hf", "qwen35_jax/assets/tiny"
    c.model.vision.update(
        depth=4,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        out_hidden_size=128,
        in_channels=3,
        patch_size=8,
        temporal_patch_size=2,
        spatial_merge_size=2,
        num_position_embeddings=64,
    )
    c.dtype, c.remat = "float32", "none"
    c.data.train, c.data.eval = ("runs/tiny_vision_data/train.jsonl",), ("runs/tiny_vision_data/eval.jsonl",)
    c.data.sequence_length, c.data.batch_size = 768, 4
    c.data.patches, c.data.patch_rows = 896, 2
    c.steps = 3500
    c.loss.balance = 0.005
    c.optimizer.name, c.optimizer.learning_rate, c.optimizer.muon_learning_rate = "muon", 1e-3, 2.5e-3
    c.optimizer.schedule, c.optimizer.decay_fraction, c.optimizer.final_fraction = "wsd", 0.5, 0.02
    c.eval_every, c.checkpoint.every = 250, 100
    return c
