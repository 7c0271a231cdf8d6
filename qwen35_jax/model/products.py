"""The products of activations with a block's parameters: where those are FP8, on each device's shard."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen35_jax.config import ModelConfig
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Operand, Fp8Weight, quantize_activation, share_activation
from qwen35_jax.ops.linear import linear
from qwen35_jax.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class Products:
    """`linear` as a block calls it: letters of `spec` are logical axes."""

    config: ModelConfig
    sharding: Sharding
    forms: Forms

    def share(self, x: jax.Array, *weights) -> jax.Array | Fp8Activation:
        """What to hand to the products of x [B, T, D] with each of `weights`: where they take x in FP8, it is quantised once."""
        if self.config.fp8_activations and any(isinstance(w, Fp8Weight) for w in weights):
            return quantize_activation(x)
        return share_activation(x, *weights)

    def __call__(self, x: jax.Array | Fp8Activation, w, spec: str, out_dtype=None) -> jax.Array:
        """linear(x, w, spec)."""
        if isinstance(w, Fp8Operand) and self.forms.fp8_training_linear != "xla":
            return self._trained(x, w, spec, out_dtype)
        if not isinstance(w, Fp8Weight):
            return self._twice(x, w, spec, out_dtype) if self._one_row(x) else linear(x, w, spec, out_dtype=out_dtype)
        if self.forms.fp8_linear == "xla" and not self.config.fp8_activations:
            return linear(x, w, spec, out_dtype=out_dtype)
        return self._sharded(x, w, spec, out_dtype)

    def _one_row(self, x) -> bool:
        """Whether a GPU has one token of x [B, T, ...]. XLA makes a product with a vector of that, for which it first turns the
        weights round: in a step of decode those of all units."""
        gpu = self.sharding.mesh.devices.flat[0].platform == "gpu"
        return gpu and not isinstance(x, Fp8Activation) and x.shape[:2] == (self.sharding.batch, 1)

    def _twice(self, x: jax.Array, w: jax.Array, spec: str, out_dtype) -> jax.Array:
        """The product with each token taken twice, which keeps XLA from that."""
        return linear(jnp.repeat(x, 2, axis=1), w, spec, out_dtype=out_dtype)[:, :1]

    def _sharded(self, x, w: Fp8Weight, spec: str, out_dtype) -> jax.Array:
        """On each device's shard. A weight that is whole on every device, since the mesh would cut its blocks, is multiplied
        whole on every device."""
        in_specs, out_spec, partial = self._specs(w, spec)

        def local(x, w):
            if self.config.fp8_activations and not isinstance(x, Fp8Activation):
                x = quantize_activation(x)
            y = linear(x, w, spec, out_dtype=out_dtype, implementation=self.forms.fp8_linear)
            return jax.lax.psum(y, partial) if partial else y

        return jax.shard_map(local, mesh=self.sharding.mesh, in_specs=in_specs, out_specs=out_spec, check_vma=False)(x, w)

    def _trained(self, x, w: Fp8Operand, spec: str, out_dtype) -> jax.Array:
        """A product in FP8, its gradients too, by a kernel on each device's shard; blocks begin anew there, as in `Fp8Operand`.

        Partial sums leave with an axis of their own and are added outside: the gradient of a sum inside would be one more.
        """
        in_specs, out_spec, partial = self._specs(w, spec)

        def local(x, w):
            whole, form = dataclasses.replace(w, cuts=()), self.forms.fp8_training_linear
            y = linear(x, whole, spec, out_dtype=out_dtype, implementation=form)
            return y[None] if partial else y

        out_specs = P(tuple(partial), *out_spec) if partial else out_spec
        y = jax.shard_map(local, mesh=self.sharding.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(x, w)
        return jax.lax.reduce_sum(y, (0,)) if partial else y  # in the dtype of y, unlike jnp.sum

    def _specs(self, w, spec: str) -> tuple[tuple[P, P], P, list[str]]:
        """How the mesh cuts (x, w) and their product, and the mesh axes over which that is a partial sum."""
        inputs, out = spec.split("->")
        x_axes, w_axes = inputs.split(",")
        w_spec = self.sharding.parameter_spec(" ".join(w_axes), *(a.shape for a in jax.tree.leaves(w)))
        cut = {a: (mesh_axes,) if mesh_axes else () for a, mesh_axes in zip(w_axes, w_spec, strict=True)}  # one axis at most
        x_spec, out_spec = (self.sharding.spec(" ".join(axes), **cut) for axes in (x_axes, out))
        return (x_spec, w_spec), out_spec, [axis for letter in w_axes if letter in x_axes for axis in cut[letter]]
