"""Grouped matmul: rows sorted by group, groups of any length, each with a kernel of its own.

A group here is the rows of one expert: S rows, E groups.

On a TPU the forward pass and the gradient of the rows are `jax.lax.ragged_dot`, which compiles to a
grouped kernel there. The gradient of the kernels is megablox's: ragged_dot's own compiles to a
dense matmul of all rows for every group (with 128 experts a whole layer had 20 times the FLOPs). On
other platforms ragged_dot is that dense matmul in every direction. There rows are laid out in
blocks of one group each and multiplied as a batch: unless groups are short, at most twice the
FLOPs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Array, Bool, Float, Int, Int32

_TILES = 512, 512, 1024  # S, I, O of the megablox kernel's tiles: they fit 16 MiB of VMEM
_MAX_BLOCK, _MIN_BLOCK = 512, 8


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "S I"], kernels: Float[Array, "E I O"], sizes: Int32[Array, " E"]
) -> Float[Array, "S O"]:
    """Each row times the kernel of its group; `sizes` are the rows of each group.

    Accumulates in float32; result and gradients have x's dtype, which the kernels must share.
    """
    return jax.lax.platform_dependent(x, kernels, sizes, tpu=jax.lax.ragged_dot, default=by_blocks)


def _forward(
    x: Float[Array, "S I"], kernels: Float[Array, "E I O"], sizes: Int32[Array, " E"]
) -> tuple[Float[Array, "S O"], tuple]:
    return grouped_matmul(x, kernels, sizes), (x, kernels, sizes)


def _backward(
    saved: tuple, gradient: Float[Array, "S O"]
) -> tuple[Float[Array, "S I"], Float[Array, "E I O"], None]:
    x, kernels, sizes = saved
    dx = grouped_matmul(gradient, kernels.swapaxes(1, 2), sizes)
    dkernels = jax.lax.platform_dependent(
        x, gradient, sizes, tpu=outer_by_megablox, default=outer_by_blocks
    )
    return dx, dkernels, None


grouped_matmul.defvjp(_forward, _backward)


class _Blocks(NamedTuple):
    """A layout of the rows in which every block belongs to one group."""

    group: Int[Array, " blocks"]
    row: Int[Array, "blocks block"]  # the row at this place
    real: Bool[Array, "blocks block"]  # is there a row at this place?
    place: Int[Array, " S"]  # of each row among the blocks * block places


def _blocks(rows: int, sizes: Int32[Array, " E"]) -> _Blocks:
    """Blocks are about half of a mean group, so that at most half of the places stay empty."""
    groups = len(sizes)
    b = 2 ** math.floor(math.log2(max(rows / groups / 2, 1)))
    b = min(max(b, _MIN_BLOCK), _MAX_BLOCK)
    n = rows // b + groups  # enough for any sizes
    first_row = jnp.cumsum(sizes) - sizes
    ends = jnp.cumsum(-(-sizes // b))
    first_block = ends - -(-sizes // b)
    group = jnp.minimum(jnp.searchsorted(ends, jnp.arange(n), side="right"), groups - 1)
    inside = (jnp.arange(n) - first_block[group])[:, None] * b + jnp.arange(b)  # blocks block
    real = inside < sizes[group][:, None]
    row = jnp.where(real, first_row[group][:, None] + inside, 0)
    owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")
    place = first_block[owner] * b + jnp.arange(rows) - first_row[owner]
    return _Blocks(group, row, real, place)


def by_blocks(
    x: Float[Array, "S I"], kernels: Float[Array, "E I O"], sizes: Int32[Array, " E"]
) -> Float[Array, "S O"]:
    """`grouped_matmul` in plain XLA."""
    blocks = _blocks(len(x), sizes)
    out = jnp.einsum("nbi,nio->nbo", x[blocks.row], kernels[blocks.group])
    return out.reshape(-1, out.shape[-1])[blocks.place]


def outer_by_blocks(
    x: Float[Array, "S I"], gradient: Float[Array, "S O"], sizes: Int32[Array, " E"]
) -> Float[Array, "E I O"]:
    """x^T @ gradient within each group: the gradient of the kernels."""
    blocks = _blocks(len(x), sizes)
    x = jnp.where(blocks.real[..., None], x[blocks.row], 0)
    outer = jnp.einsum("nbi,nbo->nio", x, gradient[blocks.row], preferred_element_type=jnp.float32)
    outer = jax.ops.segment_sum(outer, blocks.group, len(sizes), indices_are_sorted=True)
    return outer.astype(gradient.dtype)


def outer_by_megablox(
    x: Float[Array, "S I"],
    gradient: Float[Array, "S O"],
    sizes: Int32[Array, " E"],
    *,
    interpret: bool = False,
) -> Float[Array, "E I O"]:
    """`outer_by_blocks` by a Pallas kernel.

    If its tiles do not divide the rows, rows that belong to no group are added. `interpret` runs
    the kernel as plain JAX, on any device.
    """
    tile = min(_TILES[0], -(-len(x) // 8) * 8)
    x, gradient = (jnp.pad(y, [(0, -len(y) % tile), (0, 0)]) for y in (x, gradient))
    tiles = tile, _tile(x.shape[1], _TILES[1]), _tile(gradient.shape[1], _TILES[2])
    return tgmm(x.T, gradient, sizes, gradient.dtype, tiles, interpret=interpret)


def _tile(size: int, limit: int) -> int:
    """The largest multiple of 128 lanes up to `limit` that divides `size`; if there is none, the
    smaller of the two."""
    parts = (n for n in range(min(size, limit) // 128 * 128, 0, -128) if size % n == 0)
    return next(parts, min(size, limit))
