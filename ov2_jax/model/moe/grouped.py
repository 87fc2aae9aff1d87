"""Grouped matmul: rows sorted by group, each group with a kernel of its own, of any length.

Dimension letters: S rows, E groups, I and O widths in and out, N blocks of b rows.

On a TPU the forward pass and the gradient of the rows are `jax.lax.ragged_dot`, which compiles to a
grouped kernel there; the gradient of the kernels is megablox's, because ragged_dot's own compiles
to a dense matmul of all rows for every group (with 128 experts a whole layer had 20 times the
FLOPs). Elsewhere ragged_dot is that dense matmul in every direction, so rows are laid out in blocks
of one group each and multiplied as a batch, for groups of some length at most twice the FLOPs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

_TILES = 512, 512, 1024  # rows, in, out, of the megablox kernel: what fits 16 MiB of VMEM
_MAX_BLOCK, _MIN_BLOCK = 512, 8


@jax.custom_vjp
def grouped_matmul(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [S I], kernels [E I O], rows of each group int32 [E] (their sum is S) -> [S O].

    Accumulates in float32; result and gradients have x's dtype, which the kernels must share.
    """
    return jax.lax.platform_dependent(x, kernels, sizes, tpu=jax.lax.ragged_dot, default=by_blocks)


def _forward(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> tuple:
    return grouped_matmul(x, kernels, sizes), (x, kernels, sizes)


def _backward(saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernels, sizes = saved
    dx = grouped_matmul(gradient, kernels.swapaxes(1, 2), sizes)
    dkernels = jax.lax.platform_dependent(
        x, gradient, sizes, tpu=outer_by_megablox, default=outer_by_blocks
    )
    return dx, dkernels, None


grouped_matmul.defvjp(_forward, _backward)


class _Blocks(NamedTuple):
    """A layout of the rows in which every block of b rows belongs to one group."""

    group: jax.Array  # int [N]
    row: jax.Array  # int [N b]: the row that lies there
    real: jax.Array  # bool [N b]
    place: jax.Array  # int [S]: where a row lies, in N*b


def _blocks(rows: int, sizes: jax.Array) -> _Blocks:
    """Blocks are about half of a mean group, so that at most half of the places stay empty."""
    groups = len(sizes)
    b = 2 ** math.floor(math.log2(max(rows / groups / 2, 1)))
    b = min(max(b, _MIN_BLOCK), _MAX_BLOCK)
    n = rows // b + groups  # enough for any sizes
    first_row = jnp.cumsum(sizes) - sizes
    ends = jnp.cumsum(-(-sizes // b))
    first_block = ends - -(-sizes // b)
    group = jnp.minimum(jnp.searchsorted(ends, jnp.arange(n), side="right"), groups - 1)
    inside = (jnp.arange(n) - first_block[group])[:, None] * b + jnp.arange(b)  # N b
    real = inside < sizes[group][:, None]
    row = jnp.where(real, first_row[group][:, None] + inside, 0)
    owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")
    place = first_block[owner] * b + jnp.arange(rows) - first_row[owner]
    return _Blocks(group, row, real, place)


def by_blocks(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` in plain XLA."""
    blocks = _blocks(len(x), sizes)
    out = jnp.einsum("nbi,nio->nbo", x[blocks.row], kernels[blocks.group])
    return out.reshape(-1, out.shape[-1])[blocks.place]


def outer_by_blocks(x: jax.Array, gradient: jax.Array, sizes: jax.Array) -> jax.Array:
    """x^T @ gradient within each group, [E I O]: the gradient of the kernels."""
    blocks = _blocks(len(x), sizes)
    x = jnp.where(blocks.real[..., None], x[blocks.row], 0)
    outer = jnp.einsum("nbi,nbo->nio", x, gradient[blocks.row], preferred_element_type=jnp.float32)
    outer = jax.ops.segment_sum(outer, blocks.group, len(sizes), indices_are_sorted=True)
    return outer.astype(gradient.dtype)


def outer_by_megablox(
    x: jax.Array, gradient: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """The same by a Pallas kernel. Rows that its tiles do not divide are padded: no group's."""
    tile = min(_TILES[0], -(-len(x) // 8) * 8)
    x, gradient = (jnp.pad(y, [(0, -len(y) % tile), (0, 0)]) for y in (x, gradient))
    tiles = tile, _tile(x.shape[1], _TILES[1]), _tile(gradient.shape[1], _TILES[2])
    return tgmm(x.T, gradient, sizes, gradient.dtype, tiles, interpret=interpret)


def _tile(size: int, limit: int) -> int:
    """The largest whole part of `size` in lanes of 128, or `limit` where there is none."""
    parts = (n for n in range(min(size, limit) // 128 * 128, 0, -128) if size % n == 0)
    return next(parts, min(size, limit))
