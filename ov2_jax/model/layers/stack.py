"""A stack of equal layers: parameters with a leading layer axis N, and a scan over them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.model.layers.remat import rematerialised
from ov2_jax.sharding.exchange import whole_parameters


def stack(make: Callable[[nnx.Rngs], nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.Module:
    """n layers as one module whose parameters are [N ...]."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(n))


def scan_layers(
    layers: nnx.Module,
    step: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    compute: ComputeConfig,
) -> tuple[Any, Any]:
    """Runs `carry, y = step(layer, carry, x)` over a stack; compiles one layer, not n.

    Each layer's weights are gathered for its step. Returns the last carry and the stacked ys.
    """
    graph, state = nnx.split(layers)

    def body(carry: Any, layer_xs: tuple) -> tuple[Any, Any]:
        parameters, x = layer_xs
        layer = nnx.merge(graph, whole_parameters(parameters, jnp.dtype(compute.dtype)))
        carry = jax.tree.map(lambda c: checkpoint_name(c, "layer_input"), carry)
        return step(layer, carry, x)

    return jax.lax.scan(rematerialised(body, compute.remat), carry, (nnx.to_pure_dict(state), xs))
