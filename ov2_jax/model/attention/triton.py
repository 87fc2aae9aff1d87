"""Attention on a GPU: flash attention inside segments, as Pallas kernels for Triton.

A program owns a block of queries and walks over the blocks of keys that it may see, first to last;
in the backward pass another owns a block of keys and walks over the blocks of queries that may see
it. The bounds of a walk come from the segment ids (blocks.py) before the kernel starts, so the cost
of a row of many small windows is the sum of its windows and not its length squared. Blocks in which
every pair is visible are walked separately, without a mask.

Method: FlashAttention-2 (https://arxiv.org/abs/2307.08691). Matmuls take the inputs' dtype and add
up in float32; softmax and logsumexp are float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Bool, Float, Float32, Int32

from ov2_jax.model.attention import triton_kernels
from ov2_jax.model.attention.blocks import Segments, visited_blocks
from ov2_jax.model.attention.triton_kernels import Tile

MAX_HEAD_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dkv: Tile


# By bytes of an element and padded head size. As XLA compiles them for an H100, the two-byte
# kernels take 118 to 241 registers a thread and spill none; shared memory is at most 161 KB (an
# A100 has 163, an H100 227). Chosen by that, not timed on a GPU. Float32 is only for comparison:
# its matmuls use no tensor cores, and it spills.
_TILES = {
    (2, 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
    (2, 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (4, 64): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    (4, 128): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
}


def tiles(head_size: int, dtype: jnp.dtype) -> Tiles:
    """The tiles for a head size and dtype."""
    return _TILES[dtype.itemsize, _padded_size(head_size)]


def attention(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T J K"],
    segments: Segments,
    *,
    interpret: bool = False,
) -> Float[Array, "B Q H K"]:
    """Softmax attention inside segments, in q's dtype: bfloat16, float16 or float32.

    If Q or T is no multiple of the tiles, or K is neither 64 nor 128, the inputs are padded here,
    which copies q, k and v. `interpret` runs the kernels as plain JAX, on any device. Raises
    ValueError if K is more than 128 or H is no multiple of J.
    """
    heads, size = q.shape[2:]
    if size > MAX_HEAD_SIZE:
        raise ValueError(
            f"head size {size} is more than the Triton kernels' {MAX_HEAD_SIZE}: "
            "use the xla kernel of attention"
        )
    if heads % k.shape[2]:
        raise ValueError(f"{heads} query heads are no multiple of {k.shape[2]} key/value heads")
    length, plan = q.shape[1], tiles(size, q.dtype)
    step_q = max(plan.forward.q, plan.dq.q, plan.dkv.q)
    step_k = max(plan.forward.k, plan.dq.k, plan.dkv.k)
    missing = _padded_size(size) - size

    def padded(x: Float[Array, "B L H K"], step: int) -> Float[Array, "B padded H padded_size"]:
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % step), (0, 0), (0, missing)])

    out = _attention(
        _Inputs(
            padded(q, step_q),
            padded(k, step_k),
            padded(v, step_k),
            _padded_segments(segments, step_q, step_k),
        ),
        size**-0.5,
        interpret,
    )
    return out[:, :length, :, :size]


def computed_scores(segments: Segments, head_size: int, dtype: jnp.dtype) -> dict[str, int]:
    """Entries of the score matrix that each kernel computes for a head, all rows together.

    Counted from the bounds of the kernels' walks. The least possible is the sum of squared windows,
    or of the lower halves of those squares if attention is causal.
    """
    plan = tiles(head_size, dtype)
    counts = {}
    for name, tile, axis in (
        ("forward", plan.forward, 2),
        ("dq", plan.dq, 2),
        ("dkv", plan.dkv, 1),
    ):
        bounds = np.asarray(_bounds(_padded_segments(segments, tile.q, tile.k), tile, axis))
        blocks = (bounds[..., 1] - bounds[..., 0]).sum(dtype=np.int64)
        counts[name] = int(blocks) * tile.q * tile.k
    return counts


def _padded_size(size: int) -> int:
    return max(64, pl.next_power_of_2(size))


def _padded_segments(segments: Segments, step_q: int, step_k: int) -> Segments:
    """Segments whose lengths are multiples of the steps; what is added is padding (id 0)."""

    def padded(x: Int32[Array, "*any L"], step: int) -> Int32[Array, "*any padded"]:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % step)])

    q_ids, k_ids, index = segments
    return Segments(
        padded(q_ids, step_q),
        padded(k_ids, step_k),
        None if index is None else padded(index, step_q),
    )


def _bounds(segments: Segments, tile: Tile, axis: int) -> Int32[Array, "B blocks 4"]:
    """The walk of each program: (first, stop) of its blocks, (first, stop) of the unmasked ones.

    `axis` 2: a block of queries walks over blocks of keys; 1: one of keys over those of queries.
    """
    visited = visited_blocks(segments, tile.q, tile.k)
    whole = _unmasked_blocks(segments, tile)
    if axis == 1:
        visited, whole = visited.swapaxes(1, 2), whole.swapaxes(1, 2)
    place = jnp.arange(visited.shape[2], dtype=jnp.int32)
    stop = jnp.max(jnp.where(visited, place + 1, 0), -1)
    first = jnp.minimum(jnp.min(jnp.where(visited, place, len(place)), -1), stop)
    # The first run of unmasked blocks; if ids ascend along a row there is no other.
    start = jnp.min(jnp.where(whole, place, len(place)), -1)
    later = ~whole & (place > start[..., None])
    end = jnp.min(jnp.where(later, place, len(place)), -1)
    some = start < len(place)
    start, end = jnp.where(some, start, first), jnp.where(some, end, first)
    return jnp.stack([first, stop, start, end], -1).astype(jnp.int32)


def _unmasked_blocks(segments: Segments, tile: Tile) -> Bool[Array, "B q_blocks k_blocks"]:
    """Is every pair of the block visible?"""
    q_ids = segments.q_ids.reshape(segments.q_ids.shape[0], -1, tile.q)
    k_ids = segments.k_ids.reshape(segments.k_ids.shape[0], -1, tile.k)
    q_one = (q_ids == q_ids[..., :1]).all(-1) & (q_ids[..., 0] > 0)
    k_one = (k_ids == k_ids[..., :1]).all(-1)
    whole = q_one[:, :, None] & k_one[:, None, :] & (q_ids[:, :, None, 0] == k_ids[:, None, :, 0])
    if segments.q_index is None:
        return whole
    earliest = segments.q_index.reshape(-1, tile.q).min(-1)
    last_key = jnp.arange(1, k_ids.shape[1] + 1) * tile.k - 1
    return whole & (earliest[:, None] >= last_key)


class _Inputs(NamedTuple):
    """The inputs, padded to whole blocks; or their gradients, without any for the segments."""

    q: Float[Array, "B Q H K"]
    k: Float[Array, "B T J K"]
    v: Float[Array, "B T J K"]
    segments: Segments | None


class _Slopes(NamedTuple):
    """What the backward pass needs in addition to the inputs."""

    d_out: Float[Array, "B Q H K"]
    logsumexp: Float32[Array, "B H Q"]  # in base 2
    delta: Float32[Array, "B H Q"]  # sum of out * d_out


# Saved for the backward pass: inputs, out, logsumexp.
_Residuals = tuple[_Inputs, Float[Array, "B Q H K"], Float32[Array, "B H Q"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(inputs: _Inputs, scale: float, interpret: bool) -> Float[Array, "B Q H K"]:
    return _forward(inputs, scale, interpret)[0]


def _attention_forward(
    inputs: _Inputs, scale: float, interpret: bool
) -> tuple[Float[Array, "B Q H K"], _Residuals]:
    out, logsumexp = _forward(inputs, scale, interpret)
    out = checkpoint_name(out, "attention")
    logsumexp = checkpoint_name(logsumexp, "attention")
    return out, (inputs, out, logsumexp)


def _attention_backward(
    scale: float, interpret: bool, residuals: _Residuals, d_out: Float[Array, "B Q H K"]
) -> tuple[_Inputs]:
    inputs, out, logsumexp = residuals
    delta = jnp.einsum("bqhk,bqhk->bhq", out, d_out, preferred_element_type=jnp.float32)
    slopes = _Slopes(d_out, logsumexp, delta)
    dq = _backward_q(inputs, slopes, scale, interpret)
    dk, dv = _backward_kv(inputs, slopes, scale, interpret)
    return (_Inputs(dq, dk, dv, None),)


_attention.defvjp(_attention_forward, _attention_backward)


# Blocks of arrays as a program sees them. An array that a program walks over is given whole, and
# the kernel loads the blocks that it visits. The grid is (blocks, heads, B).


def _owned(block: int, size: int) -> pl.BlockSpec:
    """Of [B Q H K] or [B T J K]."""
    return pl.BlockSpec((None, block, None, size), lambda i, h, b: (b, i, h, 0))


def _owned_vector(block: int) -> pl.BlockSpec:
    """Of [B H Q]."""
    return pl.BlockSpec((None, None, block), lambda i, h, b: (b, h, i))


def _owned_ids(block: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, block), lambda i, h, b: (b, i))


def _walked(length: int, size: int, heads_each: int) -> pl.BlockSpec:
    """Of [B T J K]: the key/value head that `heads_each` query heads of the grid share."""
    return pl.BlockSpec(
        (None, length, None, size), lambda i, h, b: (b, 0, jax.lax.div(h, heads_each), 0)
    )


def _walked_ids(length: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, length), lambda i, h, b: (b, 0))


def _bounds_spec() -> pl.BlockSpec:
    return pl.BlockSpec((None, None, 4), lambda i, h, b: (b, i, 0))


def _call(kernel: Callable, name: str, tile: Tile, interpret: bool, **specs: Any) -> Callable:
    return pl.pallas_call(
        kernel,
        name=name,
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        **specs,
    )


def _matching_ids(segments: Segments) -> tuple[Int32[Array, "B Q"], Int32[Array, "B T"]]:
    """Ids that are equal only if query and key are of one segment: padding of queries is -1."""
    return jnp.where(segments.q_ids > 0, segments.q_ids, -1), segments.k_ids


def _forward(
    inputs: _Inputs, scale: float, interpret: bool
) -> tuple[Float[Array, "B Q H K"], Float32[Array, "B H Q"]]:
    """The output, and the logsumexp in base 2: infinite for a query that sees nothing."""
    q, k, v, segments = inputs
    batch, n_q, heads, size = q.shape
    n_k, groups = k.shape[1], k.shape[2]
    tile = tiles(size, q.dtype).forward
    index = segments.q_index
    q_ids, k_ids = _matching_ids(segments)
    return _call(
        functools.partial(
            triton_kernels.forward_kernel, scale=scale * math.log2(math.e), tile=tile
        ),
        "segment_attention_forward",
        tile,
        interpret,
        grid=(n_q // tile.q, heads, batch),
        in_specs=[
            _owned(tile.q, size),
            _walked(n_k, size, heads // groups),
            _walked(n_k, size, heads // groups),
            _owned_ids(tile.q),
            _walked_ids(n_k),
            None if index is None else pl.BlockSpec((tile.q,), lambda i, h, b: (i,)),
            _bounds_spec(),
        ],
        out_specs=[_owned(tile.q, size), _owned_vector(tile.q)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, n_q), jnp.float32),
        ],
    )(q, k, v, q_ids, k_ids, index, _bounds(segments, tile, 2))


def _backward_q(
    inputs: _Inputs, slopes: _Slopes, scale: float, interpret: bool
) -> Float[Array, "B Q H K"]:
    """Gradient of q."""
    q, k, v, segments = inputs
    batch, n_q, heads, size = q.shape
    n_k, groups = k.shape[1], k.shape[2]
    tile = tiles(size, q.dtype).dq
    index = segments.q_index
    q_ids, k_ids = _matching_ids(segments)
    return _call(
        functools.partial(triton_kernels.dq_kernel, scale=scale, tile=tile),
        "segment_attention_dq",
        tile,
        interpret,
        grid=(n_q // tile.q, heads, batch),
        in_specs=[
            _owned(tile.q, size),
            _walked(n_k, size, heads // groups),
            _walked(n_k, size, heads // groups),
            _owned(tile.q, size),
            _owned_vector(tile.q),
            _owned_vector(tile.q),
            _owned_ids(tile.q),
            _walked_ids(n_k),
            None if index is None else pl.BlockSpec((tile.q,), lambda i, h, b: (i,)),
            _bounds_spec(),
        ],
        out_specs=_owned(tile.q, size),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(q, k, v, *slopes, q_ids, k_ids, index, _bounds(segments, tile, 2))


def _backward_kv(
    inputs: _Inputs, slopes: _Slopes, scale: float, interpret: bool
) -> tuple[Float[Array, "B T J K"], Float[Array, "B T J K"]]:
    """Gradients of k and v."""
    q, k, v, segments = inputs
    batch, n_q, heads, size = q.shape
    n_k, groups = k.shape[1], k.shape[2]
    each = heads // groups
    tile = tiles(size, q.dtype).dkv
    index = segments.q_index
    q_ids, k_ids = _matching_ids(segments)
    all_queries = pl.BlockSpec((None, n_q, each, size), lambda i, h, b: (b, 0, h, 0))
    all_vectors = pl.BlockSpec((None, each, n_q), lambda i, h, b: (b, h, 0))
    return _call(
        functools.partial(triton_kernels.dkv_kernel, scale=scale, tile=tile),
        "segment_attention_dkv",
        tile,
        interpret,
        grid=(n_k // tile.k, groups, batch),
        in_specs=[
            all_queries,
            _owned(tile.k, size),
            _owned(tile.k, size),
            all_queries,
            all_vectors,
            all_vectors,
            _walked_ids(n_q),
            _owned_ids(tile.k),
            None if index is None else pl.BlockSpec((n_q,), lambda i, h, b: (0,)),
            _bounds_spec(),
        ],
        out_specs=[_owned(tile.k, size), _owned(tile.k, size)],
        out_shape=[
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
    )(q, k, v, *slopes, q_ids, k_ids, index, _bounds(segments, tile, 1))
