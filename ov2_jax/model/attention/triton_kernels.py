"""The three Triton kernels of segment attention; triton.py says what they are given and why.

Letters: x queries and y keys of a block, Q and K those of a row, D head size, G query heads of a
key/value head. Scores in base 2: exp2 is the GPU's own exponential.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

Ref = Any  # what Pallas hands to a kernel for an array

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
# Where a query's maximum starts: above masked scores, whose weights are then exactly 0. Started at
# _MASKED, exp2(score * scale - maximum) was infinite before a query's first visible key, since a
# fused multiply-add does not round the product and 2**-24 of 1e37 is left.
_LOWEST = -0.5 * float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Block of scores that a program holds at a time, and how Triton is to run it."""

    q: int
    k: int
    warps: int
    stages: int


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """[m n] in float32. Float32 inputs stay so: Triton would cut them to 10 bits otherwise."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return pltriton.dot(x, y, precision=precision)


def _walk(bounds_ref: Any, heads: int, step: Callable, carry: Any) -> Any:
    """`step(masked, head, block, carry)` for each block between the bounds and each head.

    One loop for blocks with a mask, whatever lies between, and one for those without.
    """
    first, stop, start, end = (bounds_ref[n] for n in range(4))

    def masked(turn: jax.Array, carry: Any) -> Any:
        head, turn = _split(turn, heads, stop - first - (end - start))
        block = first + turn
        block += jnp.where(block >= start, end - start, 0)
        return step(True, head, block, carry)

    def unmasked(turn: jax.Array, carry: Any) -> Any:
        head, turn = _split(turn, heads, end - start)
        return step(False, head, start + turn, carry)

    carry = jax.lax.fori_loop(0, heads * (stop - first - (end - start)), masked, carry)
    return jax.lax.fori_loop(0, heads * (end - start), unmasked, carry)


def _split(turn: jax.Array, heads: int, blocks: jax.Array) -> tuple[Any, jax.Array]:
    """Turn of all heads' blocks -> (head, its turn)."""
    return (0, turn) if heads == 1 else (jax.lax.div(turn, blocks), jax.lax.rem(turn, blocks))


def _visible(
    ids_x: jax.Array, ids_y: jax.Array, place_x: jax.Array | None, place_y: jax.Array | None
) -> jax.Array:
    """Boolean [x y]; places None: both ways, else y is no later than x."""
    mask = ids_x[:, None] == ids_y[None, :]
    return mask if place_x is None else mask & (place_x[:, None] >= place_y[None, :])


def forward_kernel(
    q_ref: Ref,  # [x D]
    k_ref: Ref,  # [K D]
    v_ref: Ref,  # [K D]
    q_ids_ref: Ref,  # [x]
    k_ids_ref: Ref,  # [K]
    index_ref: Ref,  # [x]
    bounds_ref: Ref,  # [4]
    out_ref: Ref,  # [x D]
    logsumexp_ref: Ref,  # [x]
    *,
    scale: float,
    tile: Tile,
) -> None:
    q, q_ids = q_ref[...], q_ids_ref[...]
    q_place = None if index_ref is None else index_ref[...]

    def step(masked: bool, head: Any, block: jax.Array, carry: tuple) -> tuple:
        out, highest, total = carry
        keys = pl.ds(block * tile.k, tile.k)
        scores = _dot(q, k_ref[keys, :].T)  # x y
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
    q_ref: Ref,  # [x D]
    k_ref: Ref,  # [K D]
    v_ref: Ref,  # [K D]
    d_out_ref: Ref,  # [x D]
    logsumexp_ref: Ref,  # [x]
    delta_ref: Ref,  # [x]
    q_ids_ref: Ref,  # [x]
    k_ids_ref: Ref,  # [K]
    index_ref: Ref,  # [x]
    bounds_ref: Ref,  # [4]
    dq_ref: Ref,  # [x D]
    *,
    scale: float,
    tile: Tile,
) -> None:
    q, d_out, q_ids = q_ref[...], d_out_ref[...], q_ids_ref[...]
    logsumexp, delta = logsumexp_ref[...], delta_ref[...]
    q_place = None if index_ref is None else index_ref[...]

    def step(masked: bool, head: Any, block: jax.Array, dq: jax.Array) -> jax.Array:
        keys = pl.ds(block * tile.k, tile.k)
        k, v = k_ref[keys, :], v_ref[keys, :]
        scores = _dot(q, k.T)  # x y
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
    q_ref: Ref,  # [Q G D]
    k_ref: Ref,  # [y D]
    v_ref: Ref,  # [y D]
    d_out_ref: Ref,  # [Q G D]
    logsumexp_ref: Ref,  # [G Q]
    delta_ref: Ref,  # [G Q]
    q_ids_ref: Ref,  # [Q]
    k_ids_ref: Ref,  # [y]
    index_ref: Ref,  # [Q]
    bounds_ref: Ref,  # [4]
    dk_ref: Ref,  # [y D]
    dv_ref: Ref,  # [y D]
    *,
    scale: float,
    tile: Tile,
) -> None:
    """Scores are held keys by queries, [y x], so that the weights feed the matmul as they lie."""
    k, v, k_ids = k_ref[...], v_ref[...], k_ids_ref[...]
    k_place = pl.program_id(0) * tile.k + jnp.arange(tile.k)

    def step(masked: bool, head: Any, block: jax.Array, carry: tuple) -> tuple:
        dk, dv = carry
        queries = pl.ds(block * tile.q, tile.q)
        q, d_out = q_ref[queries, head, :], d_out_ref[queries, head, :]
        scores = _dot(k, q.T)  # y x
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
