"""Reads a Hugging Face folder into parameters in memory, without a checkpoint in between."""

from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from conversion.formats.hf_weights import HFWeights
from conversion.formats.safetensors_io import weight_dtype
from conversion.keys import Config, ParamPath, leaves

# One sharding for all arrays, a nested dict with one for each, or None for numpy arrays.
Shardings = jax.sharding.Sharding | dict[str, Any] | None


def param_shapes(config: Config, dtype: str = "float32") -> dict[str, Any]:
    """Our parameters as a nested dict of jax.ShapeDtypeStruct: the target of a restore."""
    return unflatten_dict(
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
      sharding: of the arrays. Every process reads only what its devices hold. None gives numpy
        arrays.

    Returns:
      The config and the nested dict of stacked arrays; an encoder's has `encoder` at its top.

    Raises:
      ConversionError: the folder's keys, shapes or dtypes don't fit its config.json.
    """
    weights = HFWeights(folder, dtype)
    if sharding is None:
        return weights.config, unflatten_dict({path: weights.read(path) for path in weights.leaves})
    by_path = flatten_dict(sharding) if isinstance(sharding, dict) else None

    def load(path: ParamPath) -> jax.Array:
        shape = weights.leaves[path].shape
        target = sharding if by_path is None else by_path[path]
        return jax.make_array_from_callback(
            shape, target, lambda index: np.asarray(weights.read(path, index))
        )

    return weights.config, unflatten_dict({path: load(path) for path in weights.leaves})
