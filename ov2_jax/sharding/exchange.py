"""What devices exchange. All of it is for code inside a shard_map over the mesh of sharding.py.

The train step is one function that every device runs on its own part of the batch, so each
exchange is written where it happens and none is left to a partitioner. Without a mesh, and over
axes of size 1, these functions exchange nothing.

Gradients: what a device differentiates is its own share of the loss, and all shares add up. The
transposes of gathers and scatters then are each other, and nothing needs a rule of its own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from ov2_jax.sharding.mesh import AXES, ROW_AXES
from ov2_jax.sharding.rules import GATHERED, parameter_axes, path_string


def over(*axes: str) -> tuple[str, ...]:
    """Those of the axes that have more than one device here."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(a for a in axes if kinds.get(a) == AxisType.Manual and mesh.shape[a] > 1)


def axis_size(*axes: str) -> int:
    """Devices along the axes together."""
    size = 1
    for axis in over(*axes):
        size *= jax.sharding.get_abstract_mesh().shape[axis]
    return size


def axis_index(*axes: str) -> jax.Array | int:
    """This device's place along the axes together."""
    return jax.lax.axis_index(over(*axes)) if over(*axes) else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """All devices' parts, one behind the other along `axis`."""
    for name, groups in _stages(axes):
        x = jax.lax.all_gather(x, name, axis=axis, axis_index_groups=groups, tiled=True)
    return x


def _gather_forward(x: jax.Array, axes: tuple[str, ...], axis: int) -> tuple[jax.Array, None]:
    return gather(x, axes, axis), None


def _gather_backward(
    axes: tuple[str, ...], axis: int, saved: None, gradient: jax.Array
) -> tuple[jax.Array]:
    del saved
    return (scatter_sum(gradient, axes, axis),)


gather.defvjp(_gather_forward, _gather_backward)


def scatter_sum(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """The sum over the devices, of which each keeps its part along `axis`."""
    names = over(*axes)
    return jax.lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True) if names else x


def _stages(axes: tuple[str, ...]) -> list[tuple[str, list[list[int]] | None]]:
    """The axes one after the other, the innermost first; an axis of all devices in two stages.

    The bytes are the same in stages. A gather over all chips of a v5p slice in one operation is
    compiled to an all-reduce of the whole array: twice the bytes.
    """
    names = over(*axes)
    if len(names) != 1:
        return [(name, None) for name in reversed(names)]
    n = axis_size(*names)
    if n < axis_size(*AXES) or n % 4 or n < 16:
        return [(names[0], None)]
    near = [list(range(first, first + 4)) for first in range(0, n, 4)]
    return [(names[0], near), (names[0], [list(group) for group in zip(*near, strict=True)])]


def total(x: Any, axes: tuple[str, ...] = AXES) -> Any:
    """The sum over the devices."""
    names = over(*axes)
    return jax.lax.psum(x, names) if names else x


def maximum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The largest over the devices; it has no gradient."""
    names = over(*axes)
    return jax.lax.pmax(x, names) if names else x


def whole_parameters(params: Any, dtype: jnp.dtype) -> Any:
    """Parameters of one layer, ready for use: matrices in `dtype`, gathered where they are cut.

    Tensor-parallel axes and experts stay cut. The gradient comes back as one reduce-scatter in
    `dtype`. Named "weights", so that no rematerialisation policy ever keeps them.
    """

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        meanings = parameter_axes(path_string(path))
        if meanings is None:
            return x
        x = x if "router" in meanings else x.astype(dtype)
        # The scope tells the planner which of a program's exchanges are of weights.
        with jax.named_scope("weights"):
            for axis, meaning in enumerate(meanings, x.ndim - len(meanings)):
                x = gather(x, GATHERED.get(meaning, ()), axis)
        return checkpoint_name(x, "weights")

    return jax.tree_util.tree_map_with_path(one, params)


def gather_tokens(x: jax.Array) -> jax.Array:
    """[B L ...] of a device -> [B L' ...], all tokens of its tensor group."""
    return gather(x, ("tensor",), 1)


def scatter_tokens(x: jax.Array) -> jax.Array:
    """[B L' ...], of which every device of a tensor group has a summand -> its own tokens' sum."""
    return scatter_sum(x, ("tensor",), 1)


def gather_row(x: jax.Array) -> jax.Array:
    """[B L' ...] of a context group -> the whole row in its own order (see token_order)."""
    size = axis_size("context")
    if size == 1:
        return x
    b, n, *rest = x.shape
    x = jax.lax.all_gather(x.reshape(b, 2, n // 2, *rest), "context", axis=1)  # B context 2 ...
    pieces = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], 1)
    return pieces.reshape(b, size * n, *rest)


def row_index(length: int) -> jax.Array:
    """Where in their row the tokens [L'] of this device's context shard are; int32."""
    size = axis_size("context")
    index = jnp.arange(length, dtype=jnp.int32)
    if size == 1:
        return index
    here, piece = axis_index("context"), length // 2
    return jnp.where(index < piece, here * piece, (2 * size - 2 - here) * piece) + index


def gather_vision(x: jax.Array) -> jax.Array:
    """Merged tokens of a pack's own vision rows [G R ...] -> of all rows of the pack."""
    return gather(x, ROW_AXES, 1)
