"""AdamW as in the recipes: decay mask, warm-up and cosine, clipping, learning rates by part."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from ov2_jax.model.config import ConfigError

PARTS = ("encoder", "merger", "decoder")
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of the recipes (docs/training.md); a part is the encoder, the merger or the decoder."""

    learning_rate: float = 1e-5
    end_learning_rate: float = 1e-6
    warmup_fraction: float = 0.002
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-5
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    # Of the first moment; bfloat16 saves 2 of 12 bytes a parameter. The second is always float32:
    # a change of 1 - beta2 = 1 % is near the least that a bfloat16 can take.
    first_moment_dtype: str = "float32"
    train: tuple[str, ...] = PARTS  # a part that is not named is frozen
    # Peak learning rates of single parts; None takes `learning_rate`.
    encoder_learning_rate: float | None = None
    merger_learning_rate: float | None = None
    decoder_learning_rate: float | None = None

    def __post_init__(self) -> None:
        unknown = set(self.train) - set(PARTS)
        if unknown or not self.train:
            raise ConfigError(
                f"optimizer.train is {self.train!r}; it must name at least one of {PARTS}."
            )
        for part in PARTS:
            if self.peak(part) <= 0:
                raise ConfigError(
                    f"optimizer: the learning rate of the {part} is {self.peak(part)}; it must be "
                    f"positive. To freeze the {part}, leave it out of optimizer.train."
                )
        for name in ("beta1", "beta2", "warmup_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)."
                )
        for name in ("eps", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; it must be > 0.")
        if self.first_moment_dtype not in ("float32", "bfloat16"):
            raise ConfigError(
                f"optimizer.first_moment_dtype is {self.first_moment_dtype!r}; it must be "
                "'float32' or 'bfloat16'."
            )
        if self.weight_decay < 0 or self.end_learning_rate < 0:
            raise ConfigError("optimizer.weight_decay and end_learning_rate must not be negative.")

    def peak(self, part: str) -> float:
        value = getattr(self, f"{part}_learning_rate")
        return self.learning_rate if value is None else value


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
