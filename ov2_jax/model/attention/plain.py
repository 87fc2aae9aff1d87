"""Attention with the whole score matrix, as in a textbook. The kernels are tested against it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ov2_jax.model.attention.blocks import Segments, visible

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attention(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T J K"],
    segments: Segments,
) -> Float[Array, "B Q H K"]:
    """Attention inside segments; padding gives zeros."""
    out = masked_attention(q, k, v, visible(segments))
    return jnp.where(segments.q_ids[:, :, None, None] > 0, out, 0)


def masked_attention(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T J K"],
    mask: Bool[Array, "B Q T"],
) -> Float[Array, "B Q H K"]:
    """Plain softmax attention under a mask; scores and softmax in float32."""
    b, n_q, heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(b, n_q, groups, heads // groups, size)
    scores = jnp.einsum("bqjhk,btjk->bjhqt", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * size**-0.5, _MASKED)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("bjhqt,btjk->bqjhk", weights, v).reshape(b, n_q, heads, size)
