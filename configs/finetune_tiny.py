"""A few lines of your own for the packaged model: two minutes on two CPU cores, half of them compilation.

    python -m qwen35_jax.train --config configs/finetune_tiny.py --workdir runs/mine \
        --config.data.train="('mine.jsonl',)" --export_hf runs/mine_hf

Ten chats are learned by heart (the README's, to a loss of 0.001); what the model could do before, it mostly still can.
"""

from ml_collections import ConfigDict

from qwen35_jax.train.config import default_config


def get_config() -> ConfigDict:
    """See the top of the file."""
    c = default_config()
    c.dtype, c.remat = "float32", "none"
    c.data.sequence_length, c.data.batch_size = 128, 4
    c.steps = 60
    c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.weight_decay = 1e-3, 5, 0.0
    return c
