"""Hugging Face folder -> Orbax checkpoint.

    python -m conversion.from_hf --src=HF_DIR --dst=DIR [--dtype=float32]

Works for a full model and for a standalone encoder. DIR/params is an ordinary Orbax PyTree
checkpoint, DIR/hf holds the configuration, tokenizer and processor files, so that
`conversion.to_hf` needs no template. Arrays are written block by block straight from the memory-
mapped source: well under 2 GiB of memory for any size of model.
"""

import functools

from etils import epath

from conversion import cli
from conversion.formats import hf_folder
from conversion.formats.hf_source import HFSource
from conversion.formats.orbax_io import LazyArray, write_params
from conversion.formats.safetensors_io import WEIGHT_DTYPES
from ov2_jax.core import checkpoint_dir


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
    source = HFSource(src, dtype)
    with cli.destination(dst) as folder:
        hf = folder / checkpoint_dir.HF
        hf.mkdir()
        hf_folder.copy_side_files(src, hf)
        arrays = [
            LazyArray(leaf, source.dtype(path), functools.partial(source.read, path))
            for path, leaf in source.leaves.items()
        ]
        with cli.progress_bar("to Orbax", source.nbytes()) as progress:
            write_params(folder / checkpoint_dir.PARAMS, arrays, progress)


def main() -> None:
    parser = cli.parser("python -m conversion.from_hf", __doc__)
    parser.add_argument("--src", required=True, help="Hugging Face folder")
    parser.add_argument("--dst", required=True, help="new checkpoint folder")
    parser.add_argument("--dtype", choices=WEIGHT_DTYPES, help="cast to this (default: keep)")
    cli.main(lambda args: convert(args.src, args.dst, dtype=args.dtype), parser)


if __name__ == "__main__":
    main()
