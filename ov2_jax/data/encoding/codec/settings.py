"""The codec's parameters for a model and its packs."""

import dataclasses

from ov2_jax.config.codec import CodecConfig
from ov2_jax.config.data import DataConfig, leaves
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import ConfigError


def codec_config(data: DataConfig, model: ModelConfig, pack: PackConfig | None) -> CodecConfig:
    """data.codec with the model's patch and block size.

    Raises ConfigError if data.codec states others. If a source has codec-style clips, also if their
    canvases cannot be read or their windows fit no vision row of `pack`.
    """
    vision = model.vision
    needed = {"patch": vision.patch_size, "block_size": vision.spatial_merge_size}
    for name, value in needed.items():
        given = getattr(data.codec, name)
        if given not in (value, getattr(CodecConfig, name)):
            raise ConfigError(
                f"data.codec.{name} is {given} but the model's is {value}; leave it out."
            )
    codec = dataclasses.replace(data.codec, **needed)
    if all(source.video == "uniform" for source in leaves(data.sources)):
        return codec
    codec.check_even_blocks()
    if pack is not None:
        window = codec.images_per_group * (codec.max_pixels // codec.patch**2)
        widest = pack.vision_rows[-1][1] if pack.vision_rows else 0
        if window > widest:
            raise ConfigError(
                f"data.codec.max_pixels {codec.max_pixels} makes windows of "
                f"{codec.images_per_group} canvases, {window} patches, but the largest vision row "
                f"has {widest}; add a class of rows of at least {window} patches to "
                "pack.vision_rows, or lower data.codec.max_pixels or images_per_group."
            )
    return codec
