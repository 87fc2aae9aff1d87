"""Exchanges between devices, for code inside a shard_map over the axes of mesh.py.

The train step is one function that every device runs on its own part of the batch, so each
exchange is a call in the code and none is left to a partitioner. Without a mesh, and over axes of
size 1, these functions exchange nothing.

Gradients: a device differentiates its own share of the loss, and the shares add up. The transpose
of a gather then is a scatter, that of a scatter a gather, and no other rule is needed.

Under a mesh arrays are a device's part: L is its own tokens of a row, Q the tokens of its tensor
group, T the whole row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int, Int32, Shaped

from ov2_jax.sharding.mesh import AXES, ROW_AXES
from ov2_jax.sharding.rules import GATHERED, parameter_axes, path_string


def over(*axes: str) -> tuple[str, ...]:
    """The axes among these that have more than one device here."""
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


def axis_index(*axes: str) -> Int[Array, ""] | int:
    """This device's place along the axes together."""
    return jax.lax.axis_index(over(*axes)) if over(*axes) else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: Shaped[Array, "..."], axes: tuple[str, ...], axis: int) -> Shaped[Array, "..."]:
    """All devices' parts, one behind the other along `axis`."""
    for name, groups in _stages(axes):
        x = jax.lax.all_gather(x, name, axis=axis, axis_index_groups=groups, tiled=True)
    return x


def _gather_forward(
    x: Shaped[Array, "..."], axes: tuple[str, ...], axis: int
) -> tuple[Shaped[Array, "..."], None]:
    return gather(x, axes, axis), None


def _gather_backward(
    axes: tuple[str, ...], axis: int, saved: None, gradient: Float[Array, "..."]
) -> tuple[Float[Array, "..."]]:
    del saved
    return (scatter_sum(gradient, axes, axis),)


gather.defvjp(_gather_forward, _gather_backward)


def scatter_sum(x: Float[Array, "..."], axes: tuple[str, ...], axis: int) -> Float[Array, "..."]:
    """The sum over the devices; each keeps its part along `axis`."""
    names = over(*axes)
    return jax.lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True) if names else x


def _stages(axes: tuple[str, ...]) -> list[tuple[str, list[list[int]] | None]]:
    """The axes one after the other, the innermost first; an axis of all devices in two stages.

    Stages move the same bytes. A gather over all chips of a v5p slice in one operation is compiled
    to an all-reduce of the whole array: twice the bytes.
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
    """The sum over the devices, of an array or of each array of a tree."""
    names = over(*axes)
    return jax.lax.psum(x, names) if names else x


def maximum(x: Float[Array, "*any"], axes: tuple[str, ...]) -> Float[Array, "*any"]:
    """The largest over the devices; it has no gradient."""
    names = over(*axes)
    return jax.lax.pmax(x, names) if names else x


def whole_parameters(params: Any, dtype: jnp.dtype) -> Any:
    """Parameters of one layer, ready for use: matrices in `dtype`, gathered over the axes that cut
    them, apart from tensor parallelism and experts, which stay cut.

    The gradient comes back as one reduce-scatter in `dtype`. The result has the checkpoint name
    "weights", so that no rematerialisation policy ever keeps it.
    """

    def one(path: tuple[Any, ...], x: Float[Array, "..."]) -> Float[Array, "..."]:
        meanings = parameter_axes(path_string(path))
        if meanings is None:
            return x
        x = x if "router" in meanings else x.astype(dtype)
        # By this scope the planner finds the exchanges of weights in a compiled program.
        with jax.named_scope("weights"):
            for axis, meaning in enumerate(meanings, x.ndim - len(meanings)):
                x = gather(x, GATHERED.get(meaning, ()), axis)
        return checkpoint_name(x, "weights")

    return jax.tree_util.tree_map_with_path(one, params)


def gather_tokens(x: Shaped[Array, "B L *rest"]) -> Shaped[Array, "B Q *rest"]:
    """All tokens of a tensor group from those of each device."""
    return gather(x, ("tensor",), 1)


def scatter_tokens(x: Float[Array, "B Q *rest"]) -> Float[Array, "B L *rest"]:
    """The sum over a tensor group for a device's own tokens; x is its summand for all of them."""
    return scatter_sum(x, ("tensor",), 1)


def gather_row(x: Shaped[Array, "B Q *rest"]) -> Shaped[Array, "B T *rest"]:
    """The whole row from a context group, in the row's own order (see token_order)."""
    size = axis_size("context")
    if size == 1:
        return x
    b, n, *rest = x.shape
    x = x.reshape(b, 2, n // 2, *rest)
    x = jax.lax.all_gather(x, "context", axis=1)  # B context 2 Q/2 *rest
    pieces = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], 1)
    return pieces.reshape(b, size * n, *rest)


def row_index(length: int) -> Int32[Array, " Q"]:
    """The place in their row of this device's tokens; `length` is Q."""
    size = axis_size("context")
    index = jnp.arange(length, dtype=jnp.int32)
    if size == 1:
        return index
    here, piece = axis_index("context"), length // 2
    return jnp.where(index < piece, here * piece, (2 * size - 2 - here) * piece) + index


def gather_vision(x: Float[Array, "G merged D"]) -> Float[Array, "G M D"]:
    """The merged tokens of a pack's vision rows from those of each device's own rows."""
    return gather(x, ROW_AXES, 1)
