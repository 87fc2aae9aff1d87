"""Converts an Orbax checkpoint to a Hugging Face folder.

    python -m conversion.to_hf --src=DIR --dst=HF_DIR [--template=HF_DIR] [--dtype=bfloat16]

DIR is a converted checkpoint, a training run's work folder (its latest finished step) or one of
its steps. Configuration, tokenizer and processor come from the checkpoint's hf/ folder, or from
`--template`. If that folder has no remote code, config.json points at the released model's. Every
tensor is written into its place in its file, block by block, for any sharding of the stored arrays.
"""

from collections.abc import Callable, Mapping

import numpy as np
import tensorstore as ts
from absl import flags, logging
from etils import epath

from conversion.destination import new_folder
from conversion.formats.hf_completion import complete
from conversion.formats.hf_files import copy_side_files
from conversion.formats.orbax_io import open_params
from conversion.formats.regions import Region, blocks, overlaps, run_blocks
from conversion.formats.safetensors_io import (
    DEFAULT_MAX_SHARD_BYTES,
    DEFAULT_MAX_SHARD_SIZE,
    WEIGHT_DTYPES,
    SafetensorsWriter,
    TensorSpec,
    copy_into,
    parse_shard_size,
    weight_dtype,
)
from conversion.keys import Leaf, ParamPath, as_ours, leaves
from conversion.progress import byte_progress
from ov2_jax.config.hf import load_config
from ov2_jax.core import checkpoint_dir
from ov2_jax.core.program import Given, run


def convert(
    src: epath.PathLike,
    dst: epath.PathLike,
    *,
    template: epath.PathLike | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> list[str]:
    """Exports a checkpoint into the new folder `dst`.

    Args:
      src: any path that `ov2_jax.core.checkpoint_dir.resolve` takes.
      dst: must not exist, or be empty; appears when everything is written.
      template: a Hugging Face folder whose config and other files to use instead of `src`'s.
      dtype: cast all weights to this; None keeps each array's own.
      max_shard_bytes: largest safetensors file.

    Returns:
      The names of the side files that the source lacks, or that were completed.

    Raises:
      CheckpointError: `src` is no finished checkpoint, or has no config.json.
      ConversionError: its arrays don't fit the config (all are listed), or `dst` is taken.
    """
    checkpoint = checkpoint_dir.resolve(src)
    side_files = checkpoint.require_hf() if template is None else epath.Path(template)
    config = load_config(side_files)
    expected = leaves(config)
    arrays = open_params(checkpoint.params, expected)
    dtypes = {path: _dtype(array, dtype) for path, array in arrays.items()}
    specs = [
        TensorSpec(entry.key, entry.hf_shape, dtypes[path])
        for path, leaf in expected.items()
        for entry in leaf.entries
    ]
    with new_folder(dst) as folder:
        copy_side_files(side_files, folder)
        with (
            SafetensorsWriter(folder, specs, max_shard_bytes) as writer,
            byte_progress("to Hugging Face", sum(spec.nbytes for spec in specs)) as progress,
        ):
            _write(expected, arrays, writer, progress)
        names = {found.name for found in dtypes.values()}
        return complete(folder, config, names.pop() if len(names) == 1 else None)


def _dtype(array: ts.TensorStore, dtype: str | None) -> np.dtype:
    return weight_dtype(array.dtype.name if dtype is None else dtype)


def _write(
    expected: Mapping[ParamPath, Leaf],
    arrays: Mapping[ParamPath, ts.TensorStore],
    writer: SafetensorsWriter,
    progress: Callable[[int], None],
) -> None:
    for path, leaf in expected.items():
        array = arrays[path]

        def copy(region: Region, leaf: Leaf = leaf, array: ts.TensorStore = array) -> int:
            data = array[region].read().result()
            written = 0
            for entry, in_entry, in_region in overlaps(leaf, region):
                target = as_ours(entry, writer.array(entry.key))[in_entry]
                copy_into(target, data[in_region])
                written += target.nbytes
            return written

        # Blocks are whole chunks, so each chunk is decoded once. They grow along the rows of the
        # Hugging Face tensor first, then across them, so the bytes of one write lie together.
        chunk = array.chunk_layout.read_chunk.shape
        own = range(len(leaf.lead), len(leaf.shape))
        axes = sorted(own, key=lambda axis: axis == leaf.split_axis)
        for count in run_blocks(
            copy, blocks(leaf.shape, chunk, array.dtype.numpy_dtype.itemsize, axes)
        ):
            progress(count)


def _define_flags() -> None:
    flags.DEFINE_string("src", None, "Checkpoint, work folder or step folder.", required=True)
    flags.DEFINE_string("dst", None, "New Hugging Face folder.", required=True)
    flags.DEFINE_string("template", None, "Folder whose config, tokenizer and code to use.")
    flags.DEFINE_enum("dtype", None, WEIGHT_DTYPES, "Cast all weights to this (default: keep).")
    flags.DEFINE_string("max-shard-size", DEFAULT_MAX_SHARD_SIZE, "Largest safetensors file.")


def main(given: Given) -> None:
    made = convert(
        given.src,
        given.dst,
        template=given.template,
        dtype=given.dtype,
        max_shard_bytes=parse_shard_size(given.max_shard_size),
    )
    if made:
        print(f"Written or completed here: {', '.join(made)}.")
    print(f"{given.dst} is ready for transformers' from_pretrained.")


if __name__ == "__main__":
    run(main, _define_flags, verbosity=logging.ERROR)  # Orbax warns of what is intended here
