"""Where a run starts: the model's config, its first parameters, and the folder kept for export."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from conversion import hf_folder
from ov2_jax.checkpoint_dir import resolve
from ov2_jax.model.config import ConfigError, ModelConfig, load_config, model_config_to_hf
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.sharding import parameter_shardings
from ov2_jax.training.checkpoint import restore_params
from ov2_jax.training.config import Experiment
from ov2_jax.training.step import TrainState, abstract_state, init_state


def _differences(want: Any, got: Any, where: str = "model") -> list[str]:
    if dataclasses.is_dataclass(want):
        return [
            line
            for field in dataclasses.fields(want)
            for line in _differences(
                getattr(want, field.name), getattr(got, field.name), f"{where}.{field.name}"
            )
        ]
    return [] if want == got else [f"{where} is {want!r}, the checkpoint's {got!r}"]


def check_model(experiment: Experiment) -> None:
    """The config's model must be the checkpoint's, to the last constant; raises ConfigError."""
    if experiment.init_from is None:
        return
    found = load_config(resolve(experiment.init_from).require_hf())
    if not isinstance(found, ModelConfig):
        raise ConfigError(
            f"init_from {experiment.init_from!r} is a standalone encoder; make a full start "
            "checkpoint of it with `python -m conversion.merge`."
        )
    differences = _differences(experiment.model, found)
    if differences:
        raise ConfigError(
            f"init_from {experiment.init_from!r} holds another model: {'; '.join(differences)}. "
            "Set --config.model to what its config.json says."
        )


def tokenizer_folder(experiment: Experiment) -> epath.Path:
    """The tokenizer that is asked for, or the start checkpoint's."""
    if experiment.tokenizer is not None:
        return epath.Path(experiment.tokenizer)
    return resolve(experiment.init_from).require_hf()


def write_hf_folder(experiment: Experiment) -> None:
    """`workdir/hf`: config.json, tokenizer and processor files, which export takes along."""
    folder = pathlib.Path(experiment.workdir) / "hf"
    if folder.exists():
        return
    part = folder.with_name("hf.part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    if experiment.init_from is not None:
        hf_folder.copy_side_files(resolve(experiment.init_from).require_hf(), part)
    else:
        hf_folder.write_json(part / "config.json", model_config_to_hf(experiment.model))
    if experiment.tokenizer is not None:
        hf_folder.copy_tokenizer(experiment.tokenizer, part)
    pixels = experiment.data.min_pixels, experiment.data.max_pixels
    hf_folder.complete(part, experiment.model, None, pixels=pixels)
    part.rename(folder)


def random_params(model: ModelConfig, seed: int) -> dict[str, Any]:
    """Parameters as the recipes initialise them: normal of std 0.02, norms 1, biases 0."""
    return nnx.to_pure_dict(nnx.state(LlavaOnevision2(model, rngs=nnx.Rngs(seed)), nnx.Param))


def model_graph(experiment: Experiment) -> nnx.GraphDef:
    """The model without its parameters, to be merged with them inside a jitted function."""
    make = lambda: LlavaOnevision2(  # noqa: E731
        experiment.model, rngs=nnx.Rngs(0), compute=experiment.compute
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
