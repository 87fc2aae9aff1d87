"""Which tokens may see which, and which blocks of the score matrix hold such a pair."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Int32

from ov2_jax.core.batch import Array


class Segments(NamedTuple):
    """A query sees the keys of its own segment; with `q_index` only those up to its own place.

    Ids are 1, 2, ...; 0 is padding, which sees nothing and is not seen. `q_index` is the place of
    each query in the row of keys, None if attention goes both ways.
    """

    q_ids: Int32[Array, "B Q"]
    k_ids: Int32[Array, "B T"]
    q_index: Int32[Array, " Q"] | None


def row_segments(ids: Int32[Array, "B L"], *, causal: bool) -> Segments:
    """Segments of rows that attend to themselves."""
    index = jnp.arange(ids.shape[1], dtype=jnp.int32) if causal else None
    return Segments(ids, ids, index)


def visible(segments: Segments) -> Bool[Array, "B Q T"]:
    """May this query see this key?"""
    q, k, index = segments
    mask = (q[:, :, None] == k[:, None, :]) & (q[:, :, None] > 0)
    if index is None:
        return mask
    return mask & (index[:, None] >= jnp.arange(k.shape[1]))


def visited_blocks(
    segments: Segments, block_q: int, block_k: int
) -> Bool[Array, "B q_blocks k_blocks"]:
    """The blocks that a kernel must compute; lengths are multiples of the blocks.

    Computed from the ranges of segment ids: exact if ids ascend along a row, as packing numbers
    them. In any other order a block too many may be visited, but never one too few.
    """
    q_low, q_high = _ranges(segments.q_ids, block_q)
    k_low, k_high = _ranges(segments.k_ids, block_k)
    visited = (q_low[:, :, None] <= k_high[:, None, :]) & (k_low[:, None, :] <= q_high[:, :, None])
    if segments.q_index is None:
        return visited
    last = segments.q_index.reshape(-1, block_q).max(-1)  # q_blocks
    first = jnp.arange(0, segments.k_ids.shape[1], block_k)  # k_blocks
    return visited & (last[:, None] >= first[None, :])


def _ranges(
    ids: Int32[Array, "B L"], block: int
) -> tuple[Int32[Array, "B blocks"], Int32[Array, "B blocks"]]:
    """Smallest and largest id of each block without padding; (max int, 0) of padding alone."""
    blocks = ids.reshape(ids.shape[0], -1, block)
    low = jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max).min(-1)
    return low, blocks.max(-1)
