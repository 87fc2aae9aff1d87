"""The Hugging Face files that a run keeps for its export."""

import pathlib
import shutil

from conversion.formats import hf_folder
from ov2_jax.config.experiment import Experiment
from ov2_jax.config.hf import model_config_to_hf
from ov2_jax.core.checkpoint_dir import resolve


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
