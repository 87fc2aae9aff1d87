"""Blockwise softmax attention in plain XLA, for any device: memory is linear in a row's length.

One row, one block of queries and one block of keys at a time, so that the scores stay in the cache:
6 rows of 576 with 8 heads of 64 take 18 ms on two CPU cores; one batched product of all rows takes
49. Only the blocks that `visited_blocks` names are computed.

H/J query heads share a key/value head. In a block their queries form one list of
`stacked` = H/J * q_size, so a key/value head needs one product instead of H/J.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from ov2_jax.model.attention.blocks import Segments, visited_blocks

# -_FAR is below every real score; _FAR, the logsumexp of a query that sees nothing, is above every
# one. Finite, so that the difference of two of them is no NaN.
_FAR = 1e30
# Tokens of a block, at most.
BLOCK = 192
# If a row is cut, its blocks are a multiple of this: the CPU's matmul works in such panels.
_ALIGN = 32


def attention(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T J K"],
    segments: Segments,
    *,
    block_q: int = BLOCK,
    block_k: int = BLOCK,
) -> Float[Array, "B Q H K"]:
    """Softmax attention inside segments, in q's dtype; scores and softmax in float32.

    Longer rows are cut into equal blocks of at most `block_q` queries and `block_k` keys. A query
    that sees nothing (padding) gives zeros and passes no gradient. Output and logsumexp carry the
    checkpoint name "attention", for a remat policy that saves them.
    """
    return _attention(q, k, v, segments, block_q, block_k)


def computed_scores(
    segments: Segments, *, block_q: int = BLOCK, block_k: int = BLOCK
) -> Int32[Array, " B"]:
    """How many scores `attention` computes for each row in one head."""
    blocks = _Blocks.of(segments, block_q, block_k)
    return blocks.count.sum(-1) * (blocks.q_size * blocks.k_size)


class _Blocks(NamedTuple):
    """How rows are cut, and which blocks of keys each block of queries visits."""

    q_size: int  # queries of a block
    k_size: int  # keys of a block
    segments: Segments  # padded to whole blocks
    order: Int32[Array, "B q_blocks k_blocks"]  # the visited blocks of keys first, ascending
    count: Int32[Array, "B q_blocks"]  # visited blocks of keys

    @staticmethod
    def of(segments: Segments, block_q: int, block_k: int) -> "_Blocks":
        q_size = _block_size(segments.q_ids.shape[1], block_q)
        k_size = _block_size(segments.k_ids.shape[1], block_k)
        index = segments.q_index
        padded = Segments(
            _pad(segments.q_ids, 1, q_size),
            _pad(segments.k_ids, 1, k_size),
            None if index is None else _pad(index, 0, q_size),
        )
        visited = visited_blocks(padded, q_size, k_size)
        order = jnp.argsort(~visited, axis=-1, stable=True).astype(jnp.int32)
        return _Blocks(q_size, k_size, padded, order, visited.sum(-1, dtype=jnp.int32))

    def queries(
        self, x: Float[Array, "B Q H *rest"], groups: int
    ) -> Float[Array, "B q_blocks J stacked *rest"]:
        """Queries, or values for each of them, in blocks; `groups` is J."""
        b, length, heads, *rest = x.shape
        x = _pad(x, 1, self.q_size).reshape(b, -1, self.q_size, groups, heads // groups, *rest)
        x = jnp.moveaxis(x, 2, 4)  # B q_blocks J H/J q_size *rest
        return x.reshape(b, x.shape[1], groups, -1, *rest)

    def from_queries(
        self, x: Float[Array, "B q_blocks J stacked K"], length: int
    ) -> Float[Array, "B Q H K"]:
        """The inverse of `queries`; `length` is Q."""
        b, blocks, groups, _, size = x.shape
        x = jnp.moveaxis(x.reshape(b, blocks, groups, -1, self.q_size, size), 4, 2)
        return x.reshape(b, blocks * self.q_size, -1, size)[:, :length]

    def keys(self, x: Float[Array, "B T J K"]) -> Float[Array, "B k_blocks J k_size K"]:
        """Keys or values in blocks."""
        b, _, heads, size = x.shape
        x = _pad(x, 1, self.k_size).reshape(b, -1, self.k_size, heads, size)
        return x.swapaxes(2, 3)

    def from_keys(
        self, x: Float[Array, "B k_blocks J k_size K"], length: int
    ) -> Float[Array, "B T J K"]:
        """The inverse of `keys`; `length` is T."""
        b, blocks, heads, _, size = x.shape
        return x.swapaxes(2, 3).reshape(b, blocks * self.k_size, heads, size)[:, :length]

    def query_meta(
        self,
    ) -> tuple[Int32[Array, "B q_blocks q_size"], Int32[Array, "q_blocks q_size"]]:
        """Segment of each query, and its place among the keys."""
        ids, _, index = self.segments
        if index is None:  # every place is late enough
            index = jnp.full(ids.shape[1:], jnp.iinfo(jnp.int32).max, jnp.int32)
        return ids.reshape(ids.shape[0], -1, self.q_size), index.reshape(-1, self.q_size)

    def key_ids(self) -> Int32[Array, "B k_blocks k_size"]:
        """Segment of each key."""
        return self.segments.k_ids.reshape(self.segments.k_ids.shape[0], -1, self.k_size)


def _block_size(length: int, most: int) -> int:
    if length <= most:
        return length
    size = -(-length // -(-length // most))
    return min(most, -(-size // _ALIGN) * _ALIGN)


def _pad(x: Shaped[Array, "..."], axis: int, multiple: int) -> Shaped[Array, "..."]:
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def _dot(equation: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float32[Array, "..."]:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T J K"],
    segments: Segments,
    block_q: int,
    block_k: int,
) -> Float[Array, "B Q H K"]:
    return _forward(q, k, v, segments, block_q, block_k)[0]


def _forward(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T J K"],
    segments: Segments,
    block_q: int,
    block_k: int,
) -> tuple[Float[Array, "B Q H K"], tuple]:
    heads, size, groups = *q.shape[2:], k.shape[2]
    blocks = _Blocks.of(segments, block_q, block_k)
    scale, shared = size**-0.5, heads // groups
    q_ids, q_index = blocks.query_meta()

    def one_row(
        row: tuple,
    ) -> tuple[Float[Array, "q_blocks J stacked K"], Float32[Array, "q_blocks J stacked"]]:
        q, k, v, q_ids, k_ids, order, count = row

        def one_block(
            block: tuple,
        ) -> tuple[Float[Array, "J stacked K"], Float32[Array, "J stacked"]]:
            q, q_ids, q_index, order, count = block

            def add_keys(n: Int32[Array, ""], carry: tuple) -> tuple:
                out, top, total = carry
                j = order[n]
                seen = _seen(q_ids, q_index, k_ids[j], j * blocks.k_size)
                scores = _dot("jqk,jtk->jqt", q, k[j]) * scale
                scores = jnp.where(jnp.tile(seen, (shared, 1)), scores, -jnp.inf)
                new_top = jnp.maximum(top, scores.max(-1))
                weights = jnp.exp(scores - new_top[..., None])
                keep = jnp.exp(top - new_top)
                out = out * keep[..., None] + _dot("jqt,jtk->jqk", weights.astype(v.dtype), v[j])
                return out, new_top, total * keep + weights.sum(-1)

            carry = (
                jnp.zeros(q.shape, jnp.float32),
                jnp.full(q.shape[:-1], -_FAR, jnp.float32),
                jnp.zeros(q.shape[:-1], jnp.float32),
            )
            out, top, total = jax.lax.fori_loop(0, count, add_keys, carry)
            some = total > 0
            lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), _FAR)
            out = jnp.where(some, 1 / jnp.where(some, total, 1), 0)[..., None] * out
            return out.astype(q.dtype), lse

        return jax.lax.map(one_block, (q, q_ids, q_index, order, count))

    rows = blocks.queries(q, groups), blocks.keys(k), blocks.keys(v)
    rows += q_ids, blocks.key_ids(), blocks.order, blocks.count
    out, lse = jax.lax.map(one_row, rows)
    out = checkpoint_name(blocks.from_queries(out, q.shape[1]), "attention")
    return out, (q, k, v, segments, out, checkpoint_name(lse, "attention"))


def _backward(
    block_q: int, block_k: int, saved: tuple, d_out: Float[Array, "B Q H K"]
) -> tuple[Float[Array, "B Q H K"], Float[Array, "B T J K"], Float[Array, "B T J K"], None]:
    q, k, v, segments, out, lse = saved
    heads, size, groups = *q.shape[2:], k.shape[2]
    blocks = _Blocks.of(segments, block_q, block_k)
    scale, shared = size**-0.5, heads // groups
    q_ids, q_index = blocks.query_meta()
    # Each query's sum of weight * d_weight, which the gradient of the softmax needs.
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)  # B Q H

    def one_row(
        row: tuple,
    ) -> tuple[
        Float[Array, "q_blocks J stacked K"],
        Float[Array, "k_blocks J k_size K"],
        Float[Array, "k_blocks J k_size K"],
    ]:
        k, v, k_ids, *of_queries = row

        def one_block(carry: tuple, block: tuple) -> tuple[tuple, Float[Array, "J stacked K"]]:
            q, d_out, lse, mean, q_ids, q_index, order, count = block

            # Scores are keys x queries: a product over queries with the transpose of queries x keys
            # runs at half the speed on CPU, and two of the five products are over queries.
            def add_keys(n: Int32[Array, ""], carry: tuple) -> tuple:
                dq, dk, dv = carry
                j = order[n]
                seen = _seen(q_ids, q_index, k_ids[j], j * blocks.k_size).T  # k_size q_size
                scores = _dot("jtk,jqk->jtq", k[j], q) * scale
                scores = jnp.where(jnp.tile(seen, (1, shared)), scores, -jnp.inf)
                weights = jnp.exp(scores - lse[:, None])
                d_weights = _dot("jtk,jqk->jtq", v[j], d_out)
                d_scores = (weights * (d_weights - mean[:, None])).astype(q.dtype)
                dv = dv.at[j].add(_dot("jtq,jqk->jtk", weights.astype(d_out.dtype), d_out))
                dk = dk.at[j].add(_dot("jtq,jqk->jtk", d_scores, q))
                return dq + _dot("jkt,jtq->jkq", k[j].swapaxes(1, 2), d_scores), dk, dv

            dq = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
            dq, *carry = jax.lax.fori_loop(0, count, add_keys, (dq, *carry))
            return tuple(carry), (dq.swapaxes(1, 2) * scale).astype(q.dtype)

        zero = jnp.zeros(k.shape, jnp.float32)
        of_queries.insert(5, q_index)
        (dk, dv), dq = jax.lax.scan(one_block, (zero, zero), tuple(of_queries))
        return dq, (dk * scale).astype(k.dtype), dv.astype(v.dtype)

    rows = blocks.keys(k), blocks.keys(v), blocks.key_ids(), blocks.queries(q, groups)
    rows += blocks.queries(d_out, groups), lse, blocks.queries(mean, groups)
    rows += q_ids, blocks.order, blocks.count
    dq, dk, dv = jax.lax.map(one_row, rows)
    dq = blocks.from_queries(dq, q.shape[1])
    return dq, blocks.from_keys(dk, k.shape[1]), blocks.from_keys(dv, k.shape[1]), None


def _seen(
    q_ids: Int32[Array, " q_size"],
    q_index: Int32[Array, " q_size"],
    k_ids: Int32[Array, " k_size"],
    k_start: Int32[Array, ""],
) -> Bool[Array, "q_size k_size"]:
    """As `visible`, for one block; `k_start` is the place of the block's first key."""
    same = (q_ids[:, None] == k_ids) & (q_ids > 0)[:, None]
    return same & (q_index[:, None] >= k_start + jnp.arange(k_ids.shape[0]))


_attention.defvjp(_forward, _backward)
