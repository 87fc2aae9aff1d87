"""Hugging Face folder -> parameters in memory, without a checkpoint in between."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from conversion.formats.hf_source import HFSource
from conversion.formats.orbax_io import flatten, nest
from conversion.formats.safetensors_io import weight_dtype
from conversion.keys import Config, Path, leaves

Shardings = jax.sharding.Sharding | Mapping[str, Any] | None


def param_shapes(config: Config, dtype: str = "float32") -> dict[str, Any]:
    """Our parameters as a nested dict of jax.ShapeDtypeStruct: what a restore aims at."""
    return nest(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, weight_dtype(dtype))
            for path, leaf in leaves(config).items()
        }
    )


def load_hf_params(
    folder: epath.PathLike, *, dtype: str | None = None, sharding: Shardings = None
) -> tuple[Config, dict[str, Any]]:
    """Reads a Hugging Face folder into our parameter tree.

    Args:
      folder: a full model's or a standalone encoder's.
      dtype: cast all weights to this; None keeps each tensor's own.
      sharding: one sharding for all arrays, or a nested dict of one for each. Every process then
        reads only what its devices hold. None gives numpy arrays.

    Returns:
      The config and the nested dict of stacked arrays; an encoder's has `encoder` at its top.

    Raises:
      ConversionError: the folder's keys, shapes or dtypes don't fit its config.json.
    """
    source = HFSource(folder, dtype)
    if sharding is None:
        return source.config, nest({path: source.read(path) for path in source.leaves})
    by_path = flatten(sharding) if isinstance(sharding, Mapping) else None

    def load(path: Path) -> jax.Array:
        shape = source.leaves[path].shape
        target = sharding if by_path is None else by_path[path]
        return jax.make_array_from_callback(
            shape, target, lambda index: np.asarray(source.read(path, index))
        )

    return source.config, nest({path: load(path) for path in source.leaves})
