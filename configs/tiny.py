"""The packaged model's first run: from random weights, on the text that scripts/tiny_data.py writes. tiny_more.py goes on.

    python -m scripts.tiny_data --out runs/tiny_data
    python -m qwen35_jax.train --config configs/tiny.py --workdir runs/tiny --export_hf runs/tiny_hf
    python -m benchmarks.tiny_skills --checkpoint runs/tiny_hf

Hardware: two CPU cores, or any mesh. On two cores of an AMD EPYC (Zen 1) a step takes 2 seconds, all of it 2 hours. The
last evaluation loss is 0.288; the third command prints what it can: copying 91 %, thinking before differences 98 %.
"""

from ml_collections import ConfigDict

from qwen35_jax.train.config import default_config


def get_config() -> ConfigDict:
    """See the top of the file."""
    c = default_config()
    c.model.source, c.model.random_weights = "tiny", True
    c.dtype, c.remat = "float32", "none"  # small enough to keep everything, and CPUs have no faster dtype
    c.data.train, c.data.eval = ("runs/tiny_data/train.jsonl",), ("runs/tiny_data/eval.jsonl",)
    c.data.sequence_length, c.data.batch_size = 768, 4  # the longest chat, with tools, has 673 tokens
    c.steps = 3750
    c.loss.balance = 0.005  # experts this small and few are soon unequal
    c.optimizer.name, c.optimizer.learning_rate, c.optimizer.muon_learning_rate = "muon", 2e-3, 5e-3
    c.optimizer.schedule, c.optimizer.decay_fraction, c.optimizer.final_fraction = "wsd", 0.3, 0.02
    c.eval_every, c.checkpoint.every = 500, 200
    return c
