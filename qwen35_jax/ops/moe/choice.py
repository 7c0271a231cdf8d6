"""Which form of the mixture of experts a step uses: the one that moves fewer bytes between devices. The rule is only here."""

from __future__ import annotations

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import BLOCK
from qwen35_jax.sharding import Sharding

MOE_CHOICES = ("auto", "gather", "all_to_all")

# All-to-all has two more collectives (counts, number of passes) that wait for each other: it must save what a device could
# have sent in their time. 14 microseconds at 600 GB/s (v5p, all links); assumed, not measured.
LEAST_SAVING = 8 * 2**20


def gather_bytes(tokens: int, k: int, d: int, itemsize: int, data: int) -> int:
    """Bytes that a device receives over `data` for a layer: all others' tokens and routing, and the sums of its own back."""
    return (data - 1) * tokens * (2 * d * itemsize + 8 * k)


def all_to_all_bytes(tokens: int, k: int, d: int, itemsize: int, data: int, columns: int, fp8_activations: bool = False) -> int:
    """The same of the all-to-all form with even routing: the rows of `tokens` x k / `columns` assignments, both ways.

    `columns`: how many shards of `model` have experts of their own (1 where it cuts F: then each of them has all rows).
    `fp8_activations`: rows go there as e4m3 with a float32 scale for 128 numbers.
    """
    there = d + 4 * -(-d // BLOCK) if fp8_activations else d * itemsize
    return tokens * k * (data - 1) * (there + d * itemsize) // (data * columns)


def tokens_are_cut(sharding: Sharding) -> bool:
    """Whether each data shard has tokens of its own."""
    return "data" in (*sharding.rules["B"], *sharding.rules["T"])


def moe_form(
    form: str, sharding: Sharding, tokens: int, experts: int, k: int, d: int, itemsize: int, fp8_activations: bool = False
) -> str:
    """Form "gather" or "all_to_all": `form` itself, or for "auto" what the rule says of a step of so many tokens (of the whole
    batch), each [d] numbers with k of all `experts`. UserError for anything that is not one of `MOE_CHOICES`.

    Tokens that every data shard has (a step of one token, where sequences are cut) are exchanged by neither form, and "gather"
    it is. So is "auto" where there are no TPUs: GPUs are reported to be slow at `ragged_all_to_all`, CPUs have none.
    """
    if form not in MOE_CHOICES:
        raise UserError(f"moe form {form!r} does not exist; choose from {', '.join(MOE_CHOICES)}")
    if not tokens_are_cut(sharding):
        return "gather"
    if form != "auto":
        return form
    if sharding.mesh.devices.flat[0].platform != "tpu":
        return "gather"
    sizes = (tokens // (sharding.size("B") * sharding.size("T")), k, d, itemsize, sharding.mesh.shape["data"])
    columns = sharding.model if "model" in sharding.expert_axes({"E": experts})[0] else 1
    saving = gather_bytes(*sizes) - all_to_all_bytes(*sizes, columns, fp8_activations)
    return "all_to_all" if saving > LEAST_SAVING else "gather"
