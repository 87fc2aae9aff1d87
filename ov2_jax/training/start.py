"""The first state of a run: random parameters, or those of a checkpoint."""

import jax
from flax import nnx
from jax.sharding import Mesh

from ov2_jax.config.experiment import Experiment
from ov2_jax.config.model import ModelConfig
from ov2_jax.core.checkpoint_dir import resolve
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.sharding.rules import parameter_shardings
from ov2_jax.training.checkpoint import restore_params
from ov2_jax.training.optimizer import Tree
from ov2_jax.training.state import AbstractState, TrainState, init_state


def random_params(model: ModelConfig, seed: int) -> Tree:
    """Parameters as the recipes initialise them: normal of std 0.02, norms 1, biases 0."""
    return nnx.to_pure_dict(nnx.state(LlavaOnevision2(model, rngs=nnx.Rngs(seed)), nnx.Param))


def abstract_train_state(experiment: Experiment, mesh: Mesh) -> AbstractState:
    """Shapes, dtypes and shardings of the run's state, without making it."""
    shapes = jax.eval_shape(
        lambda: init_state(random_params(experiment.model, 0), experiment.optimizer)
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        parameter_shardings(shapes, mesh),
    )


def first_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """The state at step 0, made in its shardings: no device ever holds a whole model."""
    abstract = abstract_train_state(experiment, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    def from_params(params: Tree) -> TrainState:
        return init_state(params, experiment.optimizer)

    def from_seed() -> TrainState:
        return from_params(random_params(experiment.model, experiment.seed))

    if experiment.init_from is None:
        return jax.jit(from_seed, out_shardings=shardings)()
    params = restore_params(resolve(experiment.init_from).params, abstract.params)
    return jax.jit(from_params, out_shardings=shardings, donate_argnums=0)(params)
