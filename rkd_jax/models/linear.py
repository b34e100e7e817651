"""The linear layer of all blocks."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax.models.projection import project


class Dense(nn.Module):
    """`project` with a learned kernel ``[*inner, *outer]`` and an optional bias."""

    outer: tuple[int, ...]
    contracted: int = 1
    use_bias: bool = False
    init_scale: float = 1.0  # variance of the output for inputs of variance 1
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[x.ndim - self.contracted :] + self.outer
        inner = tuple(range(self.contracted))
        outer = tuple(range(self.contracted, len(shape)))
        init = nn.initializers.variance_scaling(
            self.init_scale, "fan_in", "normal", in_axis=inner, out_axis=outer
        )
        dtype = jnp.dtype(self.param_dtype)
        out = project(x, self.param("kernel", init, shape, dtype), self.contracted)
        if not self.use_bias:
            return out
        bias = self.param("bias", nn.initializers.zeros, self.outer, dtype)
        bias = bias.astype(x.dtype)
        return out + jnp.expand_dims(bias, range(out.ndim - bias.ndim))
