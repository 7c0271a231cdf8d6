"""The whole text model: embedding, units, final norm, head and the multi-token-prediction layer, as functions of parameters.

Axis letters, here and everywhere: B batch, S slot, T time, D model width, N query heads (value heads in Gated DeltaNet),
K key/value heads, H head width, F feed-forward width, E experts, V vocabulary, C chunk, U units.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwen35_jax.config import ModelConfig
from qwen35_jax.model import params as P
from qwen35_jax.model.inputs import Inputs, VisionRows
from qwen35_jax.model.mtp import MtpLayer
from qwen35_jax.model.unit import RMSNorm, Unit, apply_units, unit_state, with_unit_state
from qwen35_jax.model.vision import VisionModel
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.linear import linear
from qwen35_jax.ops.moe import RouterLoad, moe_form
from qwen35_jax.ops.rotary import rotary_angles
from qwen35_jax.sharding import Sharding


class Embedding(nnx.Module):
    """The vocabulary [V, D], cut over `model` by rows; serves as the head too where the two are tied."""

    def __init__(self, config: ModelConfig, sharding: Sharding):
        self.embedding = P.declare(config, "V D", (config.vocab_size, config.hidden_size))
        self.sharding = sharding

    @jax.named_scope("embed")
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, T] -> [B, T, D]. Each shard looks up the ids that it holds; the sum has one term that is not zero."""

        def local(tokens, table):
            index = tokens - jax.lax.axis_index("model") * table.shape[0]
            hit = (index >= 0) & (index < table.shape[0])
            rows = table[jnp.clip(index, 0, table.shape[0] - 1)]
            return jax.lax.psum(jnp.where(hit[..., None], rows, jnp.zeros((), rows.dtype)), "model")

        return self.sharding.shard_map(local, ("B T", "V D"), "B T D")(tokens, self.embedding.get_value())


class Head(nnx.Module):
    """The output matrix [V, D] of models that do not tie it to the embedding."""

    def __init__(self, config: ModelConfig):
        self.kernel = P.declare(config, "V D", (config.vocab_size, config.hidden_size))


@dataclasses.dataclass(frozen=True)
class Model:
    """Everything static about a model: configuration, sharding and op forms. Parameters and state are arguments.

    `params` is a nested dict: embed, units (stacked: one tree with a leading U axis; unrolled: a tuple of trees), final_norm,
    lm_head where not tied, mtp where the configuration has it.

    fully_sharded: parameters are cut over the data axes as well, and gathered where they are used, a unit at a time. For
    inference of what does not fit otherwise; training has its own (`train/weights.py`), but draws random weights so.
    """

    config: ModelConfig
    sharding: Sharding
    forms: Forms = Forms()
    fully_sharded: bool = False

    @functools.cached_property
    def stacked(self) -> bool:
        """Whether inference keeps units stacked, for a scan, which keeps compile time flat in depth.

        XLA copies the slices that a scan takes of them, on CPUs and GPUs; on TPUs it does not. Without a scan XLA:CPU gathers
        fully sharded weights, and XLA:GPU makes what its own forms of the large ops need, for many units ahead: those keep it.
        """
        c, forms = self.config, self.forms
        large = [forms.gated_delta_rule] + [forms.fp8_linear] * c.fp8_weights
        large += [forms.fp8_grouped_linear if c.fp8_weights else forms.grouped_linear] * bool(c.num_experts)
        platform = self.sharding.mesh.devices.flat[0].platform
        return self.fully_sharded or platform == "tpu" or (platform == "gpu" and "xla" in large)

    @functools.cached_property
    def _modules(self) -> dict[str, nnx.Module]:
        c, s, f = self.config, self.sharding, self.forms
        modules = {"embed": Embedding(c, s), "units": Unit(c, s, f), "final_norm": RMSNorm(c)}
        if not c.tie_word_embeddings:
            modules["lm_head"] = Head(c)
        if c.mtp_num_hidden_layers:
            modules["mtp"] = MtpLayer(c, s, f)
        return modules

    @functools.cached_property
    def _graphs(self) -> dict[str, Any]:
        return {name: nnx.graphdef(module) for name, module in self._modules.items()}

    def _merge(self, name: str, params: dict) -> nnx.Module:
        """The module with parameters (of one unit, without the unit axis) that lie as they are computed with."""
        if self.fully_sharded:
            params = P.gather(params, self._places[name], self.sharding)
        return nnx.merge(self._graphs[name], params)

    @functools.cached_property
    def _places(self) -> dict:
        """Abstract parameters by module, as they are computed with; `units` is one unit."""
        return {name: P.abstract(tree, self.sharding) for name, tree in self.declarations().items()}

    def declarations(self) -> dict:
        """nnx.Param declarations (shape, dtype, axes, initialiser) by module; `units` is one unit."""
        return {name: P.declarations(module) for name, module in self._modules.items()}

    def abstract_params(self, stacked: bool = True) -> dict:
        """ShapeDtypeStructs with shardings in the structure of `params`."""
        tree, count = self.declarations(), self.config.num_units
        units = tree.pop("units")
        result = P.abstract(tree, self.sharding)
        result["units"] = P.abstract(units, self.sharding, count) if stacked else (P.abstract(units, self.sharding),) * count
        if not self.fully_sharded:
            return result
        return {name: P.scatter(part, self.sharding, int(stacked and name == "units")) for name, part in result.items()}

    def init_params(self, seed: int = 0, stacked: bool = True) -> dict:
        """Random parameters, made on their devices; the numbers depend on `seed` alone."""
        tree, scale, places = self.declarations(), self.config.initializer_range, self.abstract_params(stacked=False)
        units, unit_places = tree.pop("units"), places.pop("units")
        params = P.initialise(tree, places, seed, scale)
        trees = tuple(P.initialise(units, place, seed, scale, u) for u, place in enumerate(unit_places))
        return params | {"units": P.stack(trees, self.abstract_params()["units"]) if stacked else trees}

    def for_one_token(self) -> Model:
        """The same model for steps of one token, see `Sharding.for_one_token`."""
        return dataclasses.replace(self, sharding=self.sharding.for_one_token())

    def inputs(self, positions, segment_ids, *, start=None, slots=None, chunk: int = 0) -> Inputs:
        """Rotary angles and masks for tokens at `positions` [B, T] (or [3, B, T]: time, height, width)."""
        cos, sin = rotary_angles(positions, self.config.rope, self.config.rotary_dim)
        return Inputs(cos, sin, segment_ids, start, slots, chunk)

    def embed(self, params: dict, tokens: jax.Array, vision: VisionRows | None = None) -> jax.Array:
        """Token ids [B, T] int32 -> [B, T, D]; rows of the vision tower take the places of their placeholders."""
        x = self._merge("embed", params["embed"])(tokens)
        return x if vision is None else jnp.where(vision.mask[..., None], vision.rows.astype(x.dtype), x)

    def hidden(
        self, params: dict, tokens: jax.Array, inputs: Inputs, state: dict | None = None, vision: VisionRows | None = None
    ) -> tuple[jax.Array, dict | None]:
        """Token ids [B, T] -> (hidden states after the final norm [B, T, D], the decoding state after these tokens)."""

        def unit(unit_params, u, carry):
            x, state = carry
            x, state, _, _ = self._merge("units", unit_params)(x, inputs, state, u)
            return x, state

        def unrolled(unit_params, u, carry):
            x, state = carry
            x, part = once(unit_params, x, unit_state(state, u, self.config.num_units))
            return x, with_unit_state(state, u, part)

        # Traced and lowered once: the compiler finds as many calls of one function as there are units.
        once = jax.jit(lambda unit_params, x, part: unit(unit_params, 0, (x, part)))
        step = unrolled if isinstance(params["units"], tuple) else unit
        x, state = apply_units(step, params["units"], (self.embed(params, tokens, vision), state))
        return self._merge("final_norm", params["final_norm"])(x), state

    def trained_hidden(
        self,
        params: dict,
        tokens: jax.Array,
        inputs: Inputs,
        wrap: Callable[[Callable], Callable],
        vision: VisionRows | None = None,
    ):
        """Token ids [B, T] -> (hidden states after the final norm [B, T, D], the load of all layers' experts or None).

        `wrap` is put around the function of one unit, (its parameters, x) -> (x, load): rematerialisation, and what is
        to be done with the parameters when they are needed.
        """

        def unit(unit_params, x):
            x, _, _, load = self._merge("units", unit_params)(x, inputs)
            return x, load

        wrapped = wrap(unit)

        def step(unit_params, u, carry):
            x, load = carry
            x, more = wrapped(unit_params, x)
            return x, jax.tree.map(jnp.add, load, more)

        experts = self.config.num_experts
        load = RouterLoad(jnp.zeros(experts), jnp.zeros(experts)) if experts else None
        x, load = apply_units(step, params["units"], (self.embed(params, tokens, vision), load))
        return self._merge("final_norm", params["final_norm"])(x), load

    def layer_outputs(self, params: dict, tokens: jax.Array, inputs: Inputs, vision: VisionRows | None = None) -> jax.Array:
        """The residual stream [layers + 1, B, T, D]: after the embedding and after each layer. For finding where numbers part."""
        x = self.embed(params, tokens, vision)
        layers, interval = self.config.num_hidden_layers, self.config.full_attention_interval
        outputs = jnp.zeros((layers + 1, *x.shape), x.dtype).at[0].set(x)

        def unit(unit_params, u, carry):
            x, outputs = carry
            x, _, after, _ = self._merge("units", unit_params)(x, inputs)
            return x, jax.lax.dynamic_update_slice(outputs, jnp.stack(after), (u * interval + 1, 0, 0, 0))

        return apply_units(unit, params["units"], (x, outputs))[1]

    def moe_form(self, tokens: int) -> str:
        """The form of the experts in a step of so many tokens of the whole batch."""
        c, itemsize = self.config, jnp.dtype(self.config.dtype).itemsize
        sizes = (tokens, c.num_experts, c.num_experts_per_tok, c.hidden_size, itemsize)
        return moe_form(self.forms.moe, self.sharding, *sizes, c.fp8_activations)

    def generation_forms(self, tokens: int) -> dict[str, str]:
        """What runs in a generation step of so many tokens of the whole batch, by op."""
        rows = tokens // (self.sharding.size("B") * self.sharding.size("T"))
        moe = {"moe": self.moe_form(tokens)} if self.config.num_experts else {}
        return self.forms.in_generation(self.config, rows) | moe

    def head(self, params: dict) -> jax.Array:
        """The output matrix [V, D]."""
        if self.config.tie_word_embeddings:
            return self._merge("embed", params["embed"]).embedding.get_value()
        return self._merge("lm_head", params["lm_head"]).kernel.get_value()

    @jax.named_scope("head")
    def logits(self, params: dict, hidden: jax.Array) -> jax.Array:
        """Hidden states after the final norm [B, T, D] -> float32 logits [B, T, V], V cut over `model`."""
        logits = linear(hidden, self.head(params), "BTD,VD->BTV", out_dtype=jnp.float32)
        return self.sharding.constrain(logits, "B T V")

    def mtp_hidden(
        self,
        params: dict,
        hidden: jax.Array,
        next_tokens: jax.Array,
        inputs: Inputs,
        cache: dict | None = None,
        vision: VisionRows | None = None,
    ):
        """Hidden states [B, T, D] of positions i and token ids [B, T] of i+1 (with `vision` at them) -> (states [B, T, D] that
        `logits` turns into predictions of the tokens i+2, the layer's cache, the load of its experts or None)."""
        return self._merge("mtp", params["mtp"])(hidden, self.embed(params, next_tokens, vision), inputs, cache)


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters of text, vision, mtp and their total; `active`: text parameters that one token uses, embedding and head
    included."""
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("replica", "data", "model"))
    tree = Model(config, Sharding(mesh)).declarations()
    parts = {name: P.count(node) for name, node in tree.items()}
    mtp = parts.pop("mtp", 0)
    parts["units"] *= config.num_units
    text = sum(parts.values())
    vision = VisionModel(config, Sharding(mesh)).count() if config.vision else 0
    unused = 0
    if config.num_experts:
        experts = 3 * config.hidden_size * config.moe_intermediate_size
        unused = (config.num_experts - config.num_experts_per_tok) * experts * config.num_hidden_layers
    return {"text": text, "vision": vision, "mtp": mtp, "total": text + vision + mtp, "active": text - unused}
