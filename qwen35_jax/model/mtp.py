"""The multi-token-prediction layer: from the hidden state at i and the token at i+1 to the token at i+2."""

from __future__ import annotations

import jax
from flax import nnx

from qwen35_jax.config import ModelConfig
from qwen35_jax.model.attention import GatedAttention
from qwen35_jax.model.inputs import Inputs
from qwen35_jax.model.params import declare
from qwen35_jax.model.unit import DecoderLayer, RMSNorm
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.linear import linear
from qwen35_jax.sharding import Sharding


class MtpLayer(nnx.Module):
    """One decoder layer with full attention over [norm(embedding), norm(hidden)] projected to D; shares embedding and head.

    Hidden states come in after the final norm, and the layer's own output (after its norm) can be fed back for longer drafts.
    """

    def __init__(self, config: ModelConfig, sharding: Sharding, forms: Forms):
        d = config.hidden_size
        # fc over the concatenation is the sum of two products: half 0 takes the embedding, half 1 the hidden state.
        self.fc = declare(config, "G D D", (2, d, d))
        self.embedding_norm = RMSNorm(config)
        self.hidden_norm = RMSNorm(config)
        self.layer = DecoderLayer(config, GatedAttention(config, sharding, forms), sharding, forms)
        self.norm = RMSNorm(config)
        self.sharding = sharding

    @jax.named_scope("mtp")
    def __call__(self, hidden: jax.Array, embedding: jax.Array, inputs: Inputs, cache: dict | None = None):
        """hidden [B, T, D] of positions i, embedding [B, T, D] of tokens i+1 -> ([B, T, D] for the head, the layer's cache, the
        load of its experts or None)."""
        halves = zip((self.embedding_norm(embedding), self.hidden_norm(hidden)), self.fc.get_value(), strict=True)
        x = sum(linear(a, w, "BTD,DM->BTM") for a, w in halves)
        x, cache, load = self.layer(self.sharding.constrain(x, "B T D"), inputs, cache)
        return self.norm(x), cache, load
