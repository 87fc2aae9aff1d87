"""Attention inside segments: the one operation that keeps windows and samples apart."""

from ov2_jax.model.attention.blocks import Segments, row_segments, visible, visited_blocks
from ov2_jax.model.attention.kernels import (
    KERNELS,
    attention,
    choose,
    first_working,
    for_platform,
    kernel_of,
)
from ov2_jax.model.attention.plain import masked_attention

__all__ = [
    "KERNELS",
    "Segments",
    "attention",
    "choose",
    "first_working",
    "for_platform",
    "kernel_of",
    "masked_attention",
    "row_segments",
    "visible",
    "visited_blocks",
]
