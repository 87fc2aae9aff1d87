"""Pixels become floats on the device, so that they travel as uint8, a quarter of the bytes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from ov2_jax.core.batch import Array

# CLIP's image statistics, as in the released preprocessor_config.json.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_patches(patches: Shaped[Array, "*any values"]) -> Float[Array, "*any values"]:
    """uint8 patches, values in the order channel, row, column, as normalised float32.

    (x / 255 - mean) / std, within 1e-6 of the Hugging Face processor's floats. Float patches are
    normalised already and come back as they are. Raises TypeError for any other dtype.
    """
    if jnp.issubdtype(patches.dtype, jnp.floating):
        return patches
    if patches.dtype != jnp.uint8:
        raise TypeError(f"patches must be uint8 or float, not {patches.dtype}.")
    area = patches.shape[-1] // len(IMAGE_MEAN)
    mean = np.repeat(np.float32(IMAGE_MEAN), area)
    std = np.repeat(np.float32(IMAGE_STD), area)
    return (patches.astype(jnp.float32) * np.float32(1 / 255) - mean) / std
