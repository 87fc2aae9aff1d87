"""Where a run starts: the model's config, its first parameters, and the folder kept for export."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from ov2_jax.config.experiment import Experiment
from ov2_jax.config.model import ModelConfig
from ov2_jax.core.checkpoint_dir import resolve
from ov2_jax.model.attention import for_platform
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.sharding.rules import parameter_shardings
from ov2_jax.training.checkpoint import restore_params
from ov2_jax.training.state import TrainState, abstract_state, init_state


def random_params(model: ModelConfig, seed: int) -> dict[str, Any]:
    """Parameters as the recipes initialise them: normal of std 0.02, norms 1, biases 0."""
    return nnx.to_pure_dict(nnx.state(LlavaOnevision2(model, rngs=nnx.Rngs(seed)), nnx.Param))


def model_graph(experiment: Experiment, platform: str) -> nnx.GraphDef:
    """The model without its parameters, to be merged with them inside a jitted function.

    `platform` ("cpu", "gpu", "tpu") decides which attention kernel it has.
    """
    compute = for_platform(experiment.compute, platform)
    make = lambda: LlavaOnevision2(  # noqa: E731
        experiment.model, rngs=nnx.Rngs(0), compute=compute
    )
    return nnx.split(nnx.eval_shape(make))[0]


def abstract_train_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the run's state."""
    return abstract_state(
        lambda: init_state(
            random_params(experiment.model, 0), experiment.optimizer, experiment.seed
        ),
        lambda shapes: parameter_shardings(shapes, mesh),
    )


def first_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """The state at step 0, made where it belongs: no device ever holds a whole model."""
    abstract = abstract_train_state(experiment, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    def make_state(params: dict[str, Any]) -> TrainState:
        return init_state(params, experiment.optimizer, experiment.seed)

    if experiment.init_from is None:
        make = lambda: make_state(random_params(experiment.model, experiment.seed))  # noqa: E731
        return jax.jit(make, out_shardings=shardings)()
    params = restore_params(resolve(experiment.init_from).params, abstract.params)
    return jax.jit(make_state, out_shardings=shardings, donate_argnums=0)(params)
