"""Which tokens may see which, and which blocks of the score matrix hold such a pair.

Dimension letters: B rows, Q queries and K keys of a row, I and J blocks of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Segments(NamedTuple):
    """A query sees the keys of its own segment; with `q_index` those up to its own place only."""

    q_ids: jax.Array  # int32 [B Q]: 1, 2, ...; 0 is padding, which sees nothing and is not seen
    k_ids: jax.Array  # int32 [B K]
    q_index: jax.Array | None  # int32 [Q]: where in the row of keys a query is; None: both ways


def row_segments(ids: jax.Array, *, causal: bool) -> Segments:
    """Segments of rows [B L] that attend to themselves."""
    index = jnp.arange(ids.shape[1], dtype=jnp.int32) if causal else None
    return Segments(ids, ids, index)


def visible(segments: Segments) -> jax.Array:
    """Boolean [B Q K]: may this query see this key?"""
    q, k, index = segments
    mask = (q[:, :, None] == k[:, None, :]) & (q[:, :, None] > 0)
    if index is None:
        return mask
    return mask & (index[:, None] >= jnp.arange(k.shape[1]))


def visited_blocks(segments: Segments, block_q: int, block_k: int) -> jax.Array:
    """Boolean [B I J]: blocks that a kernel must compute; lengths are multiples of the blocks.

    By ranges of segment ids: exact where ids ascend along a row, as packing numbers them, and
    never too few.
    """
    q_low, q_high = _ranges(segments.q_ids, block_q)
    k_low, k_high = _ranges(segments.k_ids, block_k)
    visited = (q_low[:, :, None] <= k_high[:, None, :]) & (k_low[:, None, :] <= q_high[:, :, None])
    if segments.q_index is None:
        return visited
    last = segments.q_index.reshape(-1, block_q).max(-1)  # I
    first = jnp.arange(0, segments.k_ids.shape[1], block_k)  # J
    return visited & (last[:, None] >= first[None, :])


def _ranges(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest id of each block, padding apart; of padding alone (max int, 0)."""
    blocks = ids.reshape(ids.shape[0], -1, block)
    low = jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max).min(-1)
    return low, blocks.max(-1)
