"""AdamW as in the recipes: decay mask, clipping, and a learning rate for each part."""

import math
from typing import Any

import jax
import optax
from flax import traverse_util

from ov2_jax.config.optimizer import OptimizerConfig

# Nested parameters by name, or anything of their structure: gradients, moments, shapes. The first
# name is the part: encoder, merger or decoder.
Tree = dict[str, Any]


def learning_rate_schedule(config: OptimizerConfig, part: str, steps: int) -> optax.Schedule:
    """Linear warm-up to the part's peak, then a cosine to `end_learning_rate` at the last step.

    Step 0 already has 1/warm-up of the peak, so that no step is wasted at rate 0. The last step of
    the warm-up has the peak, and the last step of the run, `steps` - 1, has the end.
    """
    peak = config.peak(part)
    warmup = max(1, math.ceil(config.warmup_fraction * steps))
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / warmup,
        peak_value=peak,
        warmup_steps=warmup - 1,
        decay_steps=warmup - 1 + max(1, steps - warmup),  # optax counts the warm-up
        end_value=min(config.end_learning_rate, peak),
    )


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
    """Everything but the learning rates, which the train step multiplies in for each part."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(
            b1=config.beta1, b2=config.beta2, eps=config.eps, mu_dtype=config.first_moment_dtype
        ),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
    )
