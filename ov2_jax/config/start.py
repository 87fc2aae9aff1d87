"""What a run takes from the checkpoint that it starts or resumes from: constants, tokenizer."""

import dataclasses
from typing import Any

from etils import epath

from ov2_jax.config.experiment import Experiment
from ov2_jax.config.hf import load_config
from ov2_jax.config.model import ModelConfig
from ov2_jax.core.checkpoint_dir import resolve
from ov2_jax.core.errors import ConfigError
from ov2_jax.core.files import to_path

# The fields that decide the sizes of parameters. All others are constants (theta, eps, tying, token
# ids, ...), which only the checkpoint has right.
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
    """The folder of the run's Hugging Face files: its own, or the start checkpoint's."""
    if resuming:
        return epath.Path(experiment.workdir) / "hf"
    if experiment.init_from is None:
        return None
    if not to_path(experiment.init_from).exists():
        raise ConfigError(f"init_from is {experiment.init_from!r}, which does not exist.")
    return resolve(experiment.init_from).require_hf()


def _constants(want: Any, got: Any, where: str) -> list[str]:
    """A sentence for each field that differs."""
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
    """The experiment with the model of the checkpoint that it starts or resumes from.

    Sizes must be equal. Constants are always the checkpoint's, and the list has a sentence for each
    that differs in the config. The weight of the router's loss belongs to the recipe, not to the
    model, and stays as it is (released models leave that loss out). Raises ConfigError or
    CheckpointError.
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
    """The run's own tokenizer, or that of the config, or the start checkpoint's."""
    if not resuming and experiment.tokenizer is not None:
        return epath.Path(experiment.tokenizer)
    return _base_folder(experiment, resuming=resuming)
