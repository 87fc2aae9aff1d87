"""Where a run starts: the model's config, its first parameters, and the folder kept for export."""

import dataclasses
import json
import shutil
from typing import Any

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

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


def write_hf_folder(experiment: Experiment, workdir: epath.Path) -> epath.Path:
    """`workdir/hf`: config.json, tokenizer and processor files, which export takes along."""
    folder = workdir / "hf"
    if folder.exists():
        return folder
    part = workdir / "hf.part"
    if part.exists():
        part.rmtree()
    part.mkdir(parents=True)
    sources = []
    if experiment.init_from is not None:
        sources.append(resolve(experiment.init_from).require_hf())
    if experiment.tokenizer is not None:
        sources.append(epath.Path(experiment.tokenizer))
    for source in sources:
        for path in source.iterdir():
            if path.is_file():
                shutil.copyfile(path, part / path.name)
    config = part / "config.json"
    if not config.exists():
        raw = model_config_to_hf(experiment.model, dtype="float32")
        config.write_text(json.dumps(raw, indent=2) + "\n")
    part.rename(folder)
    return folder


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
