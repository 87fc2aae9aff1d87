"""Attention inside segments: the one operation that keeps windows and samples apart.

Dimension letters: B rows, Q queries and K keys of a row, H heads, J key/value heads, D head size.
"""

import jax
import jax.numpy as jnp

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def segment_attention(
    q: jax.Array,  # [B Q H D]
    k: jax.Array,  # [B K J D]
    v: jax.Array,  # [B K J D]
    segment_ids: jax.Array,  # int [B K]
    *,
    causal: bool,
    block: int,
) -> jax.Array:
    """Softmax attention of every token to its own segment, [B Q H D], in q's dtype.

    Tokens of segment 0 (padding) see one another and nothing else, so that no row of the softmax
    is empty. Rows longer than `block` go block of queries by block, and the scores are made again
    in the backward pass: memory is then linear in the row's length.
    """
    length = q.shape[1]
    index = jnp.arange(length)
    if length <= block:
        mask = _mask(segment_ids, segment_ids, index, index, causal)
        return masked_attention(q, k, v, mask)

    blocks = -(-length // block)
    padding = blocks * block - length

    def split(x: jax.Array) -> jax.Array:  # [B Q ...] -> [blocks B block ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_block(q_block: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, q_segments, q_index = q_block
        return masked_attention(q, k, v, _mask(q_segments, segment_ids, q_index, index, causal))

    q_index = jnp.arange(blocks * block).reshape(blocks, block)
    out = jax.lax.map(one_block, (split(q), split(segment_ids), q_index))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], blocks * block, *q.shape[2:])[:, :length]


def _mask(
    q_segments: jax.Array,  # [B Q]
    k_segments: jax.Array,  # [B K]
    q_index: jax.Array,  # [Q]
    k_index: jax.Array,  # [K]
    causal: bool,
) -> jax.Array:
    """Boolean [B Q K]: may this query see this key?"""
    mask = q_segments[:, :, None] == k_segments[:, None, :]
    return mask & (q_index[:, None] >= k_index[None, :]) if causal else mask


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Plain softmax attention under a mask [B Q K]; scores and softmax in float32."""
    b, n_q, heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(b, n_q, groups, heads // groups, size)
    scores = jnp.einsum("bqjhd,bkjd->bjhqk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * size**-0.5, _MASKED)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("bjhqk,bkjd->bqjhd", weights, v).reshape(b, n_q, heads, size)
