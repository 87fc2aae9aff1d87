"""The state of a run, as it is saved and restored."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ov2_jax.config.optimizer import OptimizerConfig
from ov2_jax.training.optimizer import Tree, make_optimizer, split_trainable


class TrainState(NamedTuple):
    """All that a run needs to go on, apart from the loader's state."""

    step: jax.Array  # int32: optimizer steps taken or skipped
    params: Tree  # float32 masters
    opt_state: optax.OptState
    skipped: jax.Array  # int32: updates skipped in all, because something was not finite
    skipped_in_a_row: jax.Array  # int32
    rng: jax.Array  # key data of the run's random stream


Metrics = dict[str, jax.Array]


def init_state(params: Tree, config: OptimizerConfig, seed: int) -> TrainState:
    """A state at step 0; optimizer moments only for what is trained."""
    trainable, _ = split_trainable(params, config)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=make_optimizer(config).init(trainable),
        skipped=zero,
        skipped_in_a_row=zero,
        rng=jax.random.key_data(jax.random.key(seed)),
    )


def abstract_state(make: Callable[[], Any], shardings: Callable[[Any], Any]) -> Any:
    """Shapes, dtypes and shardings of what `make` would return, without making it."""
    shapes = jax.eval_shape(make)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings(shapes),
    )
