"""The batch: the contract between the data pipeline, which builds it, and the model.

A batch holds G packs. A pack is what one data shard holds in one micro-step: B text rows of L
tokens, and classes of vision rows. A class has R rows of W patches, and each class has its own R
and W. docs/design.md has the table of all dimension letters.

The data pipeline promises:

- Every array is dense, and its shape depends on the config only. Places that no sample fills are
  padding: segment id 0, target and `vision_index` -1, zeros in all other arrays.
- A sample lies whole in one text row. Its tokens are consecutive, and its positions count from 0.
- An attention window (a picture, or a few frames of a clip) lies whole in one vision row. Its
  patches are consecutive and come in blocks of m x m, so that m*m consecutive patches make one
  merged token.
- Segment ids number the samples of a text row, or the windows of a vision row, 1, 2, ... in the
  order of their places.
- A pack needs no other pack: the patches of its samples lie in its own vision rows.

The model promises that a token attends only to earlier tokens of its own segment and to itself, and
a patch only to the patches of its own segment. Packs, rows and samples therefore never mix; across
packs, only losses and gradients are added up.

The merged tokens of a pack are numbered: the classes in the order of the config, in a class the
rows in order, in a row every m*m consecutive patches, padding included. A pack has M of them, the
sum of R*W / m^2 over its classes, and `vision_index` points into this list.

`*G` stands for the leading axes: none in one pack as it is built, [G ...] in a micro-step,
[A G ...] in an optimizer step of A micro-steps. If the mesh cuts text rows over `context`, the
tokens of a row change their order on the way to the devices (sharding.rules.token_order).
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int32, UInt8

Array = jax.Array | np.ndarray

IGNORE = -1  # a target that carries no loss


class VisionRows(NamedTuple):
    """The vision rows of one class.

    `values` are the C*p*p values of a patch in the order channel, row, column: raw pixels (uint8),
    or floats that are normalised already.
    """

    patches: UInt8[Array, "*G R W values"] | Float[Array, "*G R W values"]
    patch_positions: Int32[Array, "*G R W 3"]  # (t, h, w) of each patch
    segment_ids: Int32[Array, "*G R W"]  # windows of a row; 0 is padding


class Batch(NamedTuple):
    """Packs of text rows and vision rows; the module's docstring states the rules."""

    tokens: Int32[Array, "*G B L"]
    targets: Int32[Array, "*G B L"]  # the next token if it is supervised, else IGNORE
    positions: Int32[Array, "*G B L"]
    segment_ids: Int32[Array, "*G B L"]  # samples of a row; 0 is padding
    vision_index: Int32[Array, "*G B L"]  # the merged token that goes here, -1 for text
    vision: tuple[VisionRows, ...]  # one entry for each class, in the order of the config
