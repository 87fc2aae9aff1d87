"""Building blocks: linear maps, norms, and a stack of equal layers.

Parameters are float32; a module computes in the dtype of what it is given.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.model.layers.remat import rematerialised
from ov2_jax.sharding.exchange import whole_parameters


class Linear(nnx.Module):
    """x [... in] -> x @ kernel + bias [... out]."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, std: float, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros(n_out)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # As a product of two matrices: on a CPU the gradients of one with more axes are copied.
        y = (x.reshape(-1, x.shape[-1]) @ self.kernel[...].astype(x.dtype)).reshape(
            *x.shape[:-1], -1
        )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias, statistics in float32."""

    def __init__(self, size: int, *, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        z = x.astype(jnp.float32)
        z = z - z.mean(-1, keepdims=True)
        z = z * jax.lax.rsqrt(jnp.mean(z * z, -1, keepdims=True) + self.eps)
        return (z * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm with a scale, in float32."""

    def __init__(self, size: int, *, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        z = x.astype(jnp.float32)
        z = z * jax.lax.rsqrt(jnp.mean(z * z, -1, keepdims=True) + self.eps)
        return (z * self.scale[...]).astype(x.dtype)


NORMS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}


def stack(make: Callable[[nnx.Rngs], nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.Module:
    """n layers as one module whose parameters have a leading layer axis."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(n))


def scan_layers(
    layers: nnx.Module,
    step: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    compute: ComputeConfig,
) -> tuple[Any, Any]:
    """Runs `carry, y = step(layer, carry, x)` over a stack, and gathers a layer's weights for it;
    compiles one layer, not n.

    Returns the last carry and the stacked ys.
    """
    graph, state = nnx.split(layers)

    def body(carry: Any, layer_xs: tuple) -> tuple[Any, Any]:
        parameters, x = layer_xs
        layer = nnx.merge(graph, whole_parameters(parameters, jnp.dtype(compute.dtype)))
        carry = jax.tree.map(lambda c: checkpoint_name(c, "layer_input"), carry)
        return step(layer, carry, x)

    return jax.lax.scan(rematerialised(body, compute.remat), carry, (nnx.to_pure_dict(state), xs))
