"""Further training of a checkpoint on your own chats, all weights or (lora.rank above 0) with LoRA.

    python -m qwen35_jax.train --config configs/finetune.py --workdir runs/tuned \
        --config.model.source=Qwen/Qwen3.5-0.8B --config.data.train="('mine.jsonl',)" --config.mesh=4x1 --export_hf runs/tuned_hf

Hardware: whatever holds 16 bytes a parameter over all devices (float32 weights, gradient and two moments), with LoRA 2.
It has been run on virtual CPU devices alone, so there is no time to expect.
"""

from ml_collections import ConfigDict

from qwen35_jax.train.config import default_config


def get_config() -> ConfigDict:
    """See the top of the file."""
    c = default_config()
    c.data.sequence_length, c.data.batch_size = 2048, 8
    c.steps = 200
    c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.weight_decay = 1e-5, 20, 0.0
    c.checkpoint.every = 100
    return c
