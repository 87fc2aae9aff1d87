"""The device batch: the one data structure that the loader makes and the model consumes.

Dimension letters (docs/design.md has the whole table):

    G  packs in the batch: one pack is what one data shard holds in one micro-step
    B  text rows of a pack            L  tokens of a text row
    R  vision rows of one class       W  patches of a vision row (differs by class)
    C  channels (3)  p  patch size    m  merge size
    M  merged tokens of a pack: sum over classes of R * W / m^2

A pack is closed in itself: the merged tokens that its text rows need are made by its own vision
rows, so nothing ever crosses from one pack to another but the sum of losses and gradients.
"""

from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray

IGNORE = -1  # a target that carries no loss


class VisionRows(NamedTuple):
    """Vision rows of one class; a window (an image, or a few frames) lies whole in one row."""

    patches: Array  # uint8 [G R W C*p*p] (raw pixels) or float (normalised); (C, row, column) order
    patch_positions: Array  # int32 [G R W 3]: (t, h, w) of each patch, block order
    segment_ids: Array  # int32 [G R W]: 1, 2, ... the windows of a row, 0 is padding


class Batch(NamedTuple):
    """One micro-step's batch. Everything is dense, of static shape, and padded with zeros."""

    tokens: Array  # int32 [G B L]
    targets: Array  # int32 [G B L]: the next token where it is supervised, else IGNORE
    positions: Array  # int32 [G B L]: restart at 0 with every sample
    segment_ids: Array  # int32 [G B L]: 1, 2, ... the samples of a row, 0 is padding
    vision_index: Array  # int32 [G B L]: the flat merged token that goes here, -1 for text
    vision: tuple[VisionRows, ...]  # one entry a class, in the order of the config

    # The flat merged tokens of a pack are its classes in order, in a class its rows in order, and
    # in a row every m*m consecutive patches.
