"""Attention on a TPU: Splash kernels with a block mask made of segment ids.

The Splash kernels of JAX mask by segment ids but visit every block of a row, so a row of many small
windows would cost its length squared. Here the block mask, which they read from scalar memory, is
computed from the segments of each row: only blocks that hold a visible pair are computed.
"""

import operator

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks
from jaxtyping import Array, Bool, Float, Int32, Shaped

from ov2_jax.model.attention.blocks import Segments, visited_blocks

BLOCK = 512  # longest block of queries and of keys
_LANES = 128


def block_size(length: int) -> int:
    """The largest multiple of 128 lanes up to BLOCK that divides a row's length."""
    return next(n for n in range(BLOCK, 0, -_LANES) if length % n == 0)


def attention(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T J K"],
    segments: Segments,
    *,
    interpret: bool = False,
) -> Float[Array, "B Q H K"]:
    """Softmax attention inside segments, in q's dtype.

    Rows whose length is no multiple of 128 are padded here. `interpret` runs the kernels as plain
    JAX, on any device.
    """
    length = q.shape[1]
    q, k, v = (_padded(x) for x in (q, k, v))
    index = segments.q_index
    segments = Segments(
        _padded(segments.q_ids),
        _padded(segments.k_ids),
        None if index is None else _padded(index[None])[0],
    )
    block_q, block_k = block_size(q.shape[1]), block_size(k.shape[1])
    visited = visited_blocks(segments, block_q, block_k)
    # A block of queries that is all padding sees nothing. It visits one block of keys, which keeps
    # its softmax finite; the result is thrown away below.
    visited = visited.at[:, :, 0].set(visited[:, :, 0] | ~visited.any(-1))
    causal = index is not None
    sizes = kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )

    def one_row(row: tuple) -> Float[Array, "Q H K"]:
        q, k, v, q_ids, k_ids, visited = row
        over_keys = _mask_info(visited, segments.q_index, axis=1)
        run = kernel.SplashAttentionKernel(
            over_keys,
            over_keys,
            _mask_info(visited, segments.q_index, axis=0),
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=kernel.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name="attention",
            mask_function=operator.ge if causal else None,
            interpret=interpret,
        )
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
        out = run(q * q.shape[-1] ** -0.5, k, v, kernel.SegmentIds(q_ids, k_ids))
        return out.swapaxes(0, 1)

    rows = (q, k, v, segments.q_ids, segments.k_ids, visited)
    if q.shape[0] == 1:
        out = one_row(jax.tree.map(lambda x: x[0], rows))[None]
    else:
        out = jax.lax.map(one_row, rows)
    return jnp.where(segments.q_ids[..., None, None] > 0, out, 0)[:, :length]


def computed_scores(segments: Segments) -> Int32[Array, " B"]:
    """How many scores `attention` computes for each row in one head."""
    sizes = block_size(segments.q_ids.shape[1]), block_size(segments.k_ids.shape[1])
    return visited_blocks(segments, *sizes).sum((1, 2)) * (sizes[0] * sizes[1])


def _padded(x: Shaped[Array, "B L *rest"]) -> Shaped[Array, "B padded *rest"]:
    """Axis 1 up to a multiple of 128, with zeros."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % _LANES)] + [(0, 0)] * (x.ndim - 2))


def _mask_info(
    visited: Bool[Array, "q_blocks k_blocks"], q_index: Int32[Array, " Q"] | None, *, axis: int
) -> masks.MaskInfo:
    """The mask of one row for kernels that walk along `axis` (1: keys, 0: queries).

    `data_next` is the block that lies in memory at each turn: the visited one, or the last visited
    one if this one is not, so that no block is fetched in vain.
    """
    index = jnp.where(visited, jax.lax.broadcasted_iota(jnp.int32, visited.shape, axis), -1)
    last = jax.lax.cummax(index, axis=axis)
    first = jnp.argmax(visited, axis=axis, keepdims=True)
    data_next = jnp.where(last < 0, first, last)
    small = jnp.int8 if max(visited.shape) < 128 else jnp.int16
    return masks.MaskInfo(
        data_next=data_next.astype(small)[None],
        mask_next=None,
        block_mask=visited.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=q_index,
        is_dynamic_mask=True,
    )
