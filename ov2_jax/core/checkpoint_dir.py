"""Finds the parameters and the Hugging Face files of a checkpoint.

A converted checkpoint:            A training run:
    DIR/params/   Orbax PyTree         WORKDIR/checkpoints/<step>/params/
    DIR/hf/       config, tokenizer    WORKDIR/hf/

A program that takes a checkpoint takes a DIR, a WORKDIR (its latest finished step) or the folder of
one step. A converted checkpoint may be remote (gs://).
"""

import dataclasses
import pathlib

import orbax.checkpoint as ocp
from etils import epath

from ov2_jax.core.errors import CheckpointError
from ov2_jax.core.files import is_remote, to_path

PARAMS = "params"
HF = "hf"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class CheckpointDir:
    """A checkpoint that has its parameters; `hf` may not exist, see `require_hf`."""

    params: epath.Path
    hf: epath.Path
    step: int | None  # None for a converted checkpoint

    def require_hf(self) -> epath.Path:
        """`hf`, or a CheckpointError if it has no config.json."""
        if not (self.hf / "config.json").exists():
            raise CheckpointError(
                f"{self.hf} has no config.json, so the model's sizes are unknown. A checkpoint "
                f"needs the Hugging Face files (config, tokenizer, ...) in its {HF}/ folder."
            )
        return self.hf


def absolute(path: epath.PathLike) -> epath.Path:
    """Orbax needs absolute paths; remote ones (gs://...) already are."""
    return to_path(path if is_remote(path) else pathlib.Path(path).absolute())


def is_hf_folder(path: epath.PathLike) -> bool:
    """Whether `path` is a Hugging Face model folder: it has a config.json and safetensors."""
    path = to_path(path)
    return (path / "config.json").exists() and any(path.glob("*.safetensors"))


def _is_params(path: epath.Path) -> bool:
    """Whether this is a finished Orbax PyTree; Orbax writes its metadata after all arrays."""
    return (path / "_METADATA").exists()


def _finished_steps(folder: epath.Path) -> dict[int, epath.Path]:
    """Steps whose saving has finished; Orbax gives a step its name at the end."""
    names = ocp.path.step.standard_name_format()
    return {
        found.step: found.path
        for found in names.find_all(folder)
        if _is_params(found.path / PARAMS)
    }


def resolve(path: epath.PathLike) -> CheckpointDir:
    """Finds the checkpoint that `path` names: a converted folder, a work folder or one step.

    Raises:
      CheckpointError: there is no checkpoint, or only an unfinished one.
    """
    path = absolute(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if _is_params(path / PARAMS):
        if path.parent.name == CHECKPOINTS and path.name.isdigit():
            return CheckpointDir(path / PARAMS, path.parent.parent / HF, int(path.name))
        if ".orbax-checkpoint-tmp" in path.name:
            raise CheckpointError(f"{path} is a checkpoint whose saving did not finish.")
        return CheckpointDir(path / PARAMS, path / HF, None)
    if (path / CHECKPOINTS).exists():
        steps = _finished_steps(path / CHECKPOINTS)
        if steps:
            step = max(steps)
            return CheckpointDir(steps[step] / PARAMS, path / HF, step)
        raise CheckpointError(
            f"{path / CHECKPOINTS} has no finished checkpoint"
            + (
                "; it has only unfinished or foreign ones: "
                + ", ".join(sorted(p.name for p in (path / CHECKPOINTS).iterdir()))
                if any((path / CHECKPOINTS).iterdir())
                else " yet."
            )
        )
    if (path / PARAMS).exists():
        raise CheckpointError(
            f"{path / PARAMS} is not a finished Orbax checkpoint (it has no _METADATA); its saving "
            "or copying was interrupted."
        )
    hint = " It is a Hugging Face folder; convert it with conversion.from_hf." * is_hf_folder(path)
    raise CheckpointError(
        f"{path} is not a checkpoint: it has neither {PARAMS}/ nor {CHECKPOINTS}/.{hint}"
    )
