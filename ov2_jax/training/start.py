"""Where a run starts: the model's config, its first parameters, and the folder kept for export."""

import dataclasses
import os
import pathlib
import shutil
from typing import Any

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from conversion import hf_folder
from ov2_jax.checkpoint_dir import absolute, resolve
from ov2_jax.model.config import ConfigError, ModelConfig, load_config, model_config_to_hf
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.sharding import parameter_shardings
from ov2_jax.training.checkpoint import restore_params
from ov2_jax.training.config import Experiment
from ov2_jax.training.step import TrainState, abstract_state, init_state

# What makes a model the size it is. Everything else in a ModelConfig is a constant (theta, eps,
# tying, token ids, ...) that only its checkpoint knows.
_SIZES = {
    "vision": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "patch_size",
        "spatial_merge_size",
    ),
    "text": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_experts",
        "moe_intermediate_size",
    ),
}


def _base_folder(experiment: Experiment, *, resuming: bool) -> epath.Path | None:
    """The Hugging Face files that a run goes by: its own, or the start checkpoint's."""
    if resuming:
        return epath.Path(experiment.workdir) / "hf"
    if experiment.init_from is None:
        return None
    if not epath.Path(experiment.init_from).exists():
        raise ConfigError(f"init_from is {experiment.init_from!r}, which does not exist.")
    return resolve(experiment.init_from).require_hf()


def _constants(want: Any, got: Any, where: str) -> list[str]:
    if dataclasses.is_dataclass(want):
        return [
            line
            for field in dataclasses.fields(want)
            for line in _constants(
                getattr(want, field.name), getattr(got, field.name), f"{where}.{field.name}"
            )
        ]
    return [] if want == got else [f"{where} is {got!r} as in the checkpoint, not {want!r}."]


def with_checkpoint_model(
    experiment: Experiment, *, resuming: bool
) -> tuple[Experiment, list[str]]:
    """The experiment with the model of the checkpoint that it starts or goes on from.

    Sizes must be the config's, constants are always the checkpoint's; the list says which of them
    the config had otherwise. The weight of the router's loss is no constant of a model but the
    recipe's, and stays (released models leave that loss out). Raises ConfigError, CheckpointError.
    """
    base = _base_folder(experiment, resuming=resuming)
    if base is None:
        return experiment, []
    found = load_config(base)
    if not isinstance(found, ModelConfig):
        raise ConfigError(
            f"init_from {experiment.init_from!r} is a standalone encoder; make a full start "
            "checkpoint of it with `python -m conversion.merge`."
        )
    wrong = [
        f"model.{part}.{name} is {getattr(getattr(experiment.model, part), name)}, the "
        f"checkpoint's {getattr(getattr(found, part), name)}"
        for part, names in _SIZES.items()
        for name in names
        if getattr(getattr(experiment.model, part), name) != getattr(getattr(found, part), name)
    ]
    if wrong:
        raise ConfigError(f"The checkpoint of {base} is another model: {'; '.join(wrong)}.")
    found = dataclasses.replace(found, router_aux_loss_coef=experiment.model.router_aux_loss_coef)
    notes = _constants(experiment.model, found, "model")
    return dataclasses.replace(experiment, model=found), notes


def tokenizer_folder(experiment: Experiment, *, resuming: bool) -> epath.Path:
    """The run's own tokenizer, the one that is asked for, or the start checkpoint's."""
    if not resuming and experiment.tokenizer is not None:
        return epath.Path(experiment.tokenizer)
    return _base_folder(experiment, resuming=resuming)


def write_hf_folder(experiment: Experiment) -> None:
    """At a run's start, `workdir/hf`: config.json, tokenizer and processor files, for export."""
    folder = pathlib.Path(experiment.workdir) / "hf"
    part = folder.with_name("hf.part")
    for old in (part, folder):  # of an earlier start that never came to a checkpoint
        if old.exists():
            shutil.rmtree(old)
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


def use_compilation_cache(workdir: str) -> None:
    """Keeps compiled programs, for the next start of the same run, in WORKDIR/compilation_cache.

    All hosts see that folder. JAX_COMPILATION_CACHE_DIR names another, which runs may share;
    JAX_ENABLE_COMPILATION_CACHE=false does without.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = os.fspath(absolute(workdir) / "compilation_cache")
        jax.config.update("jax_compilation_cache_dir", folder)


def random_params(model: ModelConfig, seed: int) -> dict[str, Any]:
    """Parameters as the recipes initialise them: normal of std 0.02, norms 1, biases 0."""
    return nnx.to_pure_dict(nnx.state(LlavaOnevision2(model, rngs=nnx.Rngs(seed)), nnx.Param))


def model_graph(experiment: Experiment, platform: str) -> nnx.GraphDef:
    """The model without its parameters, to be merged with them inside a jitted function.

    `platform` ("cpu", "gpu", "tpu") decides which attention kernel it has.
    """
    compute = experiment.compute.for_platform(platform)
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
