"""The state of a run, as it is saved and restored."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from ov2_jax.config.optimizer import OptimizerConfig
from ov2_jax.training.optimizer import Tree, make_optimizer, split_trainable


class TrainState(NamedTuple):
    """Everything that a run needs to go on, except the loader's state."""

    step: Int32[Array, ""]  # optimizer steps taken or skipped
    params: Tree  # float32 masters
    opt_state: optax.OptState
    skipped: Int32[Array, ""]  # updates skipped in all, because something was not finite
    skipped_in_a_row: Int32[Array, ""]


# A TrainState whose leaves are ShapeDtypeStructs with shardings.
AbstractState = Any

# A step's scalars by name; docs/training.md lists them.
Metrics = dict[str, Float32[Array, ""] | Int32[Array, ""]]


def init_state(params: Tree, config: OptimizerConfig) -> TrainState:
    """A state at step 0; only trained parameters have optimizer moments."""
    trainable, _ = split_trainable(params, config)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=make_optimizer(config).init(trainable),
        skipped=zero,
        skipped_in_a_row=zero,
    )
