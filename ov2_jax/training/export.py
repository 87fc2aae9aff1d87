"""The Hugging Face files that a run keeps for its export: config, tokenizer and processor."""

import pathlib
import shutil

from conversion.formats.hf_completion import complete
from conversion.formats.hf_files import copy_side_files, copy_tokenizer, write_json
from ov2_jax.config.experiment import Experiment
from ov2_jax.config.hf import model_config_to_hf
from ov2_jax.core.checkpoint_dir import resolve


def write_hf_folder(experiment: Experiment) -> None:
    """Writes WORKDIR/hf when a run starts; the folder appears under its name only when whole."""
    folder = pathlib.Path(experiment.workdir) / "hf"
    part = folder.with_name("hf.part")
    for old in (part, folder):  # of an earlier start that never came to a checkpoint
        if old.exists():
            shutil.rmtree(old)
    part.mkdir(parents=True)
    if experiment.init_from is not None:
        copy_side_files(resolve(experiment.init_from).require_hf(), part)
    else:
        write_json(part / "config.json", model_config_to_hf(experiment.model))
    if experiment.tokenizer is not None:
        copy_tokenizer(experiment.tokenizer, part)
    pixels = experiment.data.min_pixels, experiment.data.max_pixels
    complete(part, experiment.model, None, pixels=pixels)
    part.rename(folder)
