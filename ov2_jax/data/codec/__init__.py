"""Codec-style video: many frames sparsely, by the bits that their parts cost the video codec."""

from ov2_jax.data.codec.config import CodecConfig
from ov2_jax.data.codec.select import Selection, TooFewFrames, select_patches

__all__ = ["CodecConfig", "Selection", "TooFewFrames", "select_patches"]
