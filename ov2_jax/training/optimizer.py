"""AdamW as in the recipes: decay mask, warm-up and cosine, clipping, learning rates by part."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from ov2_jax.config.optimizer import OptimizerConfig

Tree = dict[str, Any]


def learning_rate(config: OptimizerConfig, part: str, step: jax.Array, steps: int) -> jax.Array:
    """Linear warm-up to the part's peak, then a cosine to `end_learning_rate` at the last step.

    The first step (0) already has 1/warm-up of the peak, so that no step is wasted at rate 0.
    """
    peak = config.peak(part)
    warmup = max(1, math.ceil(config.warmup_fraction * steps))
    step = step.astype(jnp.float32)
    progress = jnp.clip((step - warmup + 1) / max(1, steps - warmup), 0, 1)
    end = min(config.end_learning_rate, peak)
    cosine = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup, peak * (step + 1) / warmup, cosine)


def split_trainable(params: Tree, config: OptimizerConfig) -> tuple[Tree, Tree]:
    """(trainable, frozen), two nested trees with no leaf in common.

    The standalone encoder's pooling head, which a full model may carry along, takes no part in
    the forward pass and is always frozen: weight decay would eat it.
    """
    trainable, frozen = {}, {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        free = path[0] in config.train and path[:2] != ("encoder", "head")
        (trainable if free else frozen)[path] = leaf
    return traverse_util.unflatten_dict(trainable), traverse_util.unflatten_dict(frozen)


def join(trainable: Tree, frozen: Tree) -> Tree:
    """The inverse of `split_trainable`."""
    flat = traverse_util.flatten_dict(trainable) | traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict(flat)


def _decayed(params: Tree) -> Tree:
    """Decay falls on matrices and embeddings, not on biases and norms."""

    def one(path: tuple[Any, ...], _: Any) -> bool:
        return path[-1].key in ("kernel", "embedding", "probe")

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Everything but the learning rate, which `apply_updates` multiplies in."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(
            b1=config.beta1, b2=config.beta2, eps=config.eps, mu_dtype=config.first_moment_dtype
        ),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
    )


def apply_updates(params: Tree, updates: Tree, rates: Mapping[str, jax.Array]) -> Tree:
    """params - rate(part) * updates; the part is the first name of a parameter's path."""

    def one(path: tuple[Any, ...], p: jax.Array, u: jax.Array) -> jax.Array:
        return p - rates[path[0].key] * u

    return jax.tree_util.tree_map_with_path(one, params, updates)
