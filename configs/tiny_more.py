"""The packaged model's second run: what the first one learned less well, copying, tools and thinking, with all else kept up.

    python -m scripts.tiny_data --out runs/tiny_more_data --mixture second --seed 1 --size 40000
    python -m qwen35_jax.train --config configs/tiny_more.py --workdir runs/tiny_more --export_hf runs/tiny_more_hf
    python -m benchmarks.tiny_skills --checkpoint runs/tiny_more_hf --cases 128

It begins where configs/tiny.py ended, in runs/tiny_hf, with a new optimizer and half its learning rates, which fall all along.
Hardware: two CPU cores, or any mesh. On two cores of an AMD EPYC that did other work too, 52 minutes. The last evaluation loss is
0.293 (of its own mixture), and the third command prints the table of docs/benchmarks.md.
"""

from ml_collections import ConfigDict

from qwen35_jax.train.config import default_config


def get_config() -> ConfigDict:
    """See the top of the file."""
    c = default_config()
    c.model.source = "runs/tiny_hf"
    c.dtype, c.remat = "float32", "none"
    c.data.train, c.data.eval = ("runs/tiny_more_data/train.jsonl",), ("runs/tiny_more_data/eval.jsonl",)
    c.data.sequence_length, c.data.batch_size = 768, 4
    c.steps = 1200
    c.loss.balance = 0.005
    c.optimizer.name, c.optimizer.learning_rate, c.optimizer.muon_learning_rate = "muon", 1e-3, 2.5e-3
    c.optimizer.schedule, c.optimizer.warmup_steps, c.optimizer.decay_fraction, c.optimizer.final_fraction = "wsd", 50, 0.9, 0.02
    c.eval_every, c.checkpoint.every = 300, 200
    return c
