"""The three Triton kernels of segment attention; triton.py explains their inputs.

A program sees one block of queries and one head, or one block of keys and the H/J query heads that
share a key/value head (`shared`). `q_size` and `k_size` are the queries and keys of a block, Q and
T those of a row. Scores are in base 2: exp2 is the GPU's own exponential.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Bool, Float, Float32, Int32

Ref = Any  # an array in the kernel's memory: has a shape and a dtype

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
# A query's maximum starts here, above masked scores, so that their weights are exactly 0. When it
# started at _MASKED, exp2(score * scale - maximum) was infinite before a query's first visible key:
# a fused multiply-add does not round the product, and 2**-24 of 1e37 is left.
_LOWEST = -0.5 * float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries and keys of the block of scores that a program holds, and Triton's options for it."""

    q: int
    k: int
    warps: int
    stages: int


def _dot(
    x: Float[Array, "rows inner"], y: Float[Array, "inner columns"]
) -> Float32[Array, "rows columns"]:
    """x @ y. Float32 inputs keep their precision: by default Triton cuts them to 10 bits."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return pltriton.dot(x, y, precision=precision)


def _walk(bounds_ref: Int32[Ref, "4"], heads: int, step: Callable, carry: Any) -> Any:
    """`step(masked, head, block, carry)` for each block between the bounds and each head.

    One loop takes the blocks with a mask, before and behind those without; one takes the others.
    """
    first, stop, start, end = (bounds_ref[n] for n in range(4))

    def masked(turn: Int32[Array, ""], carry: Any) -> Any:
        head, turn = _split(turn, heads, stop - first - (end - start))
        block = first + turn
        block += jnp.where(block >= start, end - start, 0)
        return step(True, head, block, carry)

    def unmasked(turn: Int32[Array, ""], carry: Any) -> Any:
        head, turn = _split(turn, heads, end - start)
        return step(False, head, start + turn, carry)

    carry = jax.lax.fori_loop(0, heads * (stop - first - (end - start)), masked, carry)
    return jax.lax.fori_loop(0, heads * (end - start), unmasked, carry)


def _split(
    turn: Int32[Array, ""], heads: int, blocks: Int32[Array, ""]
) -> tuple[Int32[Array, ""] | int, Int32[Array, ""]]:
    """The head that a turn of the loop belongs to, and the turn among those of that head."""
    return (0, turn) if heads == 1 else (jax.lax.div(turn, blocks), jax.lax.rem(turn, blocks))


def _visible(
    q_ids: Int32[Array, " q_size"],
    k_ids: Int32[Array, " k_size"],
    q_place: Int32[Array, " q_size"] | None,
    k_place: Int32[Array, " k_size"] | None,
) -> Bool[Array, "q_size k_size"]:
    """May this query see this key? With places only keys that are no later than the query."""
    mask = q_ids[:, None] == k_ids[None, :]
    return mask if q_place is None else mask & (q_place[:, None] >= k_place[None, :])


def forward_kernel(
    q_ref: Float[Ref, "q_size K"],
    k_ref: Float[Ref, "T K"],
    v_ref: Float[Ref, "T K"],
    q_ids_ref: Int32[Ref, " q_size"],
    k_ids_ref: Int32[Ref, " T"],
    index_ref: Int32[Ref, " q_size"] | None,
    bounds_ref: Int32[Ref, "4"],
    out_ref: Float[Ref, "q_size K"],
    logsumexp_ref: Float32[Ref, " q_size"],
    *,
    scale: float,
    tile: Tile,
) -> None:
    """Output and logsumexp of a block of queries."""
    q, q_ids = q_ref[...], q_ids_ref[...]
    q_place = None if index_ref is None else index_ref[...]

    def step(
        masked: bool, head: Int32[Array, ""] | int, block: Int32[Array, ""], carry: tuple
    ) -> tuple:
        out, highest, total = carry
        keys = pl.ds(block * tile.k, tile.k)
        scores = _dot(q, k_ref[keys, :].T)  # q_size k_size
        if masked:
            k_place = None if q_place is None else block * tile.k + jnp.arange(tile.k)
            mask = _visible(q_ids, k_ids_ref[keys], q_place, k_place)
            scores = jnp.where(mask, scores, _MASKED)
        new = jnp.maximum(highest, scores.max(-1) * scale)
        weights = jnp.exp2(scores * scale - new[:, None])
        kept = jnp.exp2(highest - new)
        total = total * kept + weights.sum(-1)
        v = v_ref[keys, :]
        return out * kept[:, None] + _dot(weights.astype(v.dtype), v), new, total

    carry = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((tile.q,), _LOWEST * scale, jnp.float32),
        jnp.zeros((tile.q,), jnp.float32),
    )
    out, highest, total = _walk(bounds_ref, 1, step, carry)
    blind = total == 0  # sees no key at all
    total = jnp.where(blind, 1.0, total)
    out_ref[...] = jnp.where(blind[:, None], 0.0, out / total[:, None]).astype(out_ref.dtype)
    logsumexp_ref[...] = jnp.where(blind, jnp.inf, highest + jnp.log2(total))


def dq_kernel(
    q_ref: Float[Ref, "q_size K"],
    k_ref: Float[Ref, "T K"],
    v_ref: Float[Ref, "T K"],
    d_out_ref: Float[Ref, "q_size K"],
    logsumexp_ref: Float32[Ref, " q_size"],
    delta_ref: Float32[Ref, " q_size"],
    q_ids_ref: Int32[Ref, " q_size"],
    k_ids_ref: Int32[Ref, " T"],
    index_ref: Int32[Ref, " q_size"] | None,
    bounds_ref: Int32[Ref, "4"],
    dq_ref: Float[Ref, "q_size K"],
    *,
    scale: float,
    tile: Tile,
) -> None:
    """Gradient of a block of queries."""
    q, d_out, q_ids = q_ref[...], d_out_ref[...], q_ids_ref[...]
    logsumexp, delta = logsumexp_ref[...], delta_ref[...]
    q_place = None if index_ref is None else index_ref[...]

    def step(
        masked: bool,
        head: Int32[Array, ""] | int,
        block: Int32[Array, ""],
        dq: Float32[Array, "q_size K"],
    ) -> Float32[Array, "q_size K"]:
        keys = pl.ds(block * tile.k, tile.k)
        k, v = k_ref[keys, :], v_ref[keys, :]
        scores = _dot(q, k.T)  # q_size k_size
        if masked:
            k_place = None if q_place is None else block * tile.k + jnp.arange(tile.k)
            mask = _visible(q_ids, k_ids_ref[keys], q_place, k_place)
            scores = jnp.where(mask, scores, _MASKED)
        weights = jnp.exp2(scores * (scale * math.log2(math.e)) - logsumexp[:, None])
        d_scores = weights * (_dot(d_out, v.T) - delta[:, None])
        return dq + _dot(d_scores.astype(k.dtype), k)

    dq = _walk(bounds_ref, 1, step, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def dkv_kernel(
    q_ref: Float[Ref, "Q shared K"],
    k_ref: Float[Ref, "k_size K"],
    v_ref: Float[Ref, "k_size K"],
    d_out_ref: Float[Ref, "Q shared K"],
    logsumexp_ref: Float32[Ref, "shared Q"],
    delta_ref: Float32[Ref, "shared Q"],
    q_ids_ref: Int32[Ref, " Q"],
    k_ids_ref: Int32[Ref, " k_size"],
    index_ref: Int32[Ref, " Q"] | None,
    bounds_ref: Int32[Ref, "4"],
    dk_ref: Float[Ref, "k_size K"],
    dv_ref: Float[Ref, "k_size K"],
    *,
    scale: float,
    tile: Tile,
) -> None:
    """Gradients of a block of keys and values.

    Scores are held keys by queries, so that the weights go into the matmul without a transpose.
    """
    k, v, k_ids = k_ref[...], v_ref[...], k_ids_ref[...]
    k_place = pl.program_id(0) * tile.k + jnp.arange(tile.k)

    def step(
        masked: bool, head: Int32[Array, ""] | int, block: Int32[Array, ""], carry: tuple
    ) -> tuple:
        dk, dv = carry
        queries = pl.ds(block * tile.q, tile.q)
        q, d_out = q_ref[queries, head, :], d_out_ref[queries, head, :]
        scores = _dot(k, q.T)  # k_size q_size
        if masked:
            mask = k_ids[:, None] == q_ids_ref[queries][None, :]
            if index_ref is not None:
                mask &= k_place[:, None] <= index_ref[queries][None, :]
            scores = jnp.where(mask, scores, _MASKED)
        logsumexp = logsumexp_ref[head, queries]
        weights = jnp.exp2(scores * (scale * math.log2(math.e)) - logsumexp[None, :])
        dv += _dot(weights.astype(d_out.dtype), d_out)
        d_scores = weights * (_dot(v, d_out.T) - delta_ref[head, queries][None, :])
        return dk + _dot(d_scores.astype(q.dtype), q), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _walk(bounds_ref, logsumexp_ref.shape[0], step, (zeros, zeros))
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)
