"""Converts a Hugging Face folder to an Orbax checkpoint.

    python -m conversion.from_hf --src=HF_DIR --dst=DIR [--dtype=float32]

HF_DIR has a full model or a standalone encoder. DIR/params becomes an ordinary Orbax PyTree
checkpoint. DIR/hf gets the configuration, tokenizer and processor files, so `conversion.to_hf`
needs no template. Arrays are written block by block from the memory-mapped source: this takes well
under 2 GiB of memory for any size of model.
"""

import functools

from absl import flags, logging
from etils import epath

from conversion.destination import new_folder
from conversion.formats.hf_files import copy_side_files
from conversion.formats.hf_weights import HFWeights
from conversion.formats.orbax_io import LazyArray, write_params
from conversion.formats.safetensors_io import WEIGHT_DTYPES
from conversion.progress import byte_progress
from ov2_jax.core import checkpoint_dir
from ov2_jax.core.program import Given, run


def convert(src: epath.PathLike, dst: epath.PathLike, *, dtype: str | None = None) -> None:
    """Converts the folder `src` into the new folder `dst`.

    Args:
      src: a Hugging Face folder with config.json and safetensors.
      dst: must not exist, or be empty; appears when everything is written.
      dtype: cast all weights to this; None keeps each tensor's own.

    Raises:
      ConversionError: keys, shapes or dtypes don't fit config.json (all are listed), the files
        are damaged, or `dst` is taken. Nothing has been written then.
    """
    weights = HFWeights(src, dtype)
    with new_folder(dst) as folder:
        hf = folder / checkpoint_dir.HF
        hf.mkdir()
        copy_side_files(src, hf)
        arrays = [
            LazyArray(leaf, weights.dtype(path), functools.partial(weights.read, path))
            for path, leaf in weights.leaves.items()
        ]
        with byte_progress("to Orbax", weights.nbytes()) as progress:
            write_params(folder / checkpoint_dir.PARAMS, arrays, progress)


def _define_flags() -> None:
    flags.DEFINE_string("src", None, "Hugging Face folder.", required=True)
    flags.DEFINE_string("dst", None, "New checkpoint folder.", required=True)
    flags.DEFINE_enum("dtype", None, WEIGHT_DTYPES, "Cast all weights to this (default: keep).")


def main(given: Given) -> None:
    convert(given.src, given.dst, dtype=given.dtype)


if __name__ == "__main__":
    run(main, _define_flags, verbosity=logging.ERROR)  # Orbax warns of what is intended here
