"""LayerNorm and RMSNorm over the last axis: parameters and statistics are float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class LayerNorm(nnx.Module):
    """LayerNorm with a scale and a bias."""

    def __init__(self, size: int, *, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size))
        self.eps = eps

    def __call__(self, x: Float[Array, "*any size"]) -> Float[Array, "*any size"]:
        z = x.astype(jnp.float32)
        z = z - z.mean(-1, keepdims=True)
        z = z * jax.lax.rsqrt(jnp.mean(z * z, -1, keepdims=True) + self.eps)
        return (z * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm with a scale."""

    def __init__(self, size: int, *, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: Float[Array, "*any size"]) -> Float[Array, "*any size"]:
        z = x.astype(jnp.float32)
        z = z * jax.lax.rsqrt(jnp.mean(z * z, -1, keepdims=True) + self.eps)
        return (z * self.scale[...]).astype(x.dtype)


NORMS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}
