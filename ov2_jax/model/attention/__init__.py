"""Attention inside segments: the one operation that keeps windows and samples apart."""

from ov2_jax.model.attention.blocks import Segments, row_segments, visible, visited_blocks
from ov2_jax.model.attention.plain import masked_attention, segment_attention

__all__ = [
    "Segments",
    "masked_attention",
    "row_segments",
    "segment_attention",
    "visible",
    "visited_blocks",
]
