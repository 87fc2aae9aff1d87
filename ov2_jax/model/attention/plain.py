"""Attention as it is written in a book: the whole score matrix. What kernels are tested against.

Dimension letters: B rows, Q queries and K keys of a row, H heads, J key/value heads, D head size.
"""

import jax
import jax.numpy as jnp

from ov2_jax.model.attention.blocks import Segments, visible

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments) -> jax.Array:
    """Attention inside segments, [B Q H D]; padding gives zeros."""
    out = masked_attention(q, k, v, visible(segments))
    return jnp.where(segments.q_ids[:, :, None, None] > 0, out, 0)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Plain softmax attention under a mask [B Q K]; scores and softmax in float32."""
    b, n_q, heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(b, n_q, groups, heads // groups, size)
    scores = jnp.einsum("bqjhd,bkjd->bjhqk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * size**-0.5, _MASKED)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("bjhqk,bkjd->bqjhd", weights, v).reshape(b, n_q, heads, size)
