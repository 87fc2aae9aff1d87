"""Orbax checkpoint -> Hugging Face folder.

    python -m conversion.to_hf --src=DIR --dst=HF_DIR [--template=HF_DIR] [--dtype=bfloat16]

DIR is a converted checkpoint, a training run's work folder (its latest finished step) or one of
its steps. Configuration, tokenizer and processor come from the checkpoint's hf/ folder, or from
`--template`; where a folder brings no remote code, config.json points at the released model's.
Every tensor is written into its place in its file, block by block, whatever the sharding of the
stored arrays.
"""

import argparse
from collections.abc import Callable, Mapping

import numpy as np
import tensorstore as ts
from etils import epath

from conversion import cli
from conversion.formats import hf_folder
from conversion.formats.hf_source import overlaps
from conversion.formats.orbax_io import Index, blocks, open_params, run_blocks
from conversion.formats.safetensors_io import (
    DEFAULT_MAX_SHARD_BYTES,
    WEIGHT_DTYPES,
    SafetensorsWriter,
    TensorSpec,
    copy_into,
    weight_dtype,
)
from conversion.keys import Leaf, Path, as_ours, leaves
from ov2_jax.config.hf import load_config
from ov2_jax.core import checkpoint_dir


def convert(
    src: epath.PathLike,
    dst: epath.PathLike,
    *,
    template: epath.PathLike | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> list[str]:
    """Exports a checkpoint into the new folder `dst`; returns the side files that were made up.

    Args:
      src: whatever `ov2_jax.checkpoint_dir.resolve` takes.
      dst: must not exist, or be empty; appears when everything is written.
      template: a Hugging Face folder whose config and other files to use instead of `src`'s.
      dtype: cast all weights to this; None keeps each array's own.
      max_shard_bytes: largest safetensors file.

    Raises:
      CheckpointError: `src` is no finished checkpoint, or nothing says what its sizes are.
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
    with cli.destination(dst) as folder:
        hf_folder.copy_side_files(side_files, folder)
        with (
            SafetensorsWriter(folder, specs, max_shard_bytes) as writer,
            cli.progress_bar("to Hugging Face", sum(spec.nbytes for spec in specs)) as progress,
        ):
            _write(expected, arrays, writer, progress)
        names = {found.name for found in dtypes.values()}
        return hf_folder.complete(folder, config, names.pop() if len(names) == 1 else None)


def _dtype(array: ts.TensorStore, dtype: str | None) -> np.dtype:
    return weight_dtype(array.dtype.name if dtype is None else dtype)


def _write(
    expected: Mapping[Path, Leaf],
    arrays: Mapping[Path, ts.TensorStore],
    writer: SafetensorsWriter,
    progress: Callable[[int], None],
) -> None:
    for path, leaf in expected.items():
        array = arrays[path]

        def copy(region: Index, leaf: Leaf = leaf, array: ts.TensorStore = array) -> int:
            data = array[region].read().result()
            written = 0
            for entry, inner, outer in overlaps(leaf, region):
                target = as_ours(entry, writer.array(entry.key))[inner]
                copy_into(target, data[outer])
                written += target.nbytes
            return written

        # Whole chunks, as each is decoded once; widened along the rows of the Hugging Face
        # tensor first, then across them, so that what is written lies together.
        chunk = array.chunk_layout.read_chunk.shape
        own = range(len(leaf.lead), len(leaf.shape))
        axes = sorted(own, key=lambda axis: axis == leaf.split_axis)
        for count in run_blocks(
            copy, blocks(leaf.shape, chunk, array.dtype.numpy_dtype.itemsize, axes)
        ):
            progress(count)


def main() -> None:
    parser = cli.parser("python -m conversion.to_hf", __doc__)
    parser.add_argument("--src", required=True, help="checkpoint, work folder or step folder")
    parser.add_argument("--dst", required=True, help="new Hugging Face folder")
    parser.add_argument("--template", help="folder whose config, tokenizer and code to use")
    parser.add_argument("--dtype", choices=WEIGHT_DTYPES, help="cast to this (default: keep)")
    cli.add_max_shard_size(parser)

    def run(args: argparse.Namespace) -> None:
        made = convert(
            args.src,
            args.dst,
            template=args.template,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_size,
        )
        if made:
            print(f"written anew, as the source had none or another: {', '.join(made)}")
        print(f"{args.dst} is ready for transformers' from_pretrained.")

    cli.main(run, parser)


if __name__ == "__main__":
    main()
