"""Where things lie: the mesh, one table of rules for parameters, one for activations."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ov2_jax.model.config import ConfigError

# Packs of the batch, and so the rows of every activation, are spread over these axes.
BATCH_AXES = ("data", "fsdp")

# What the axes of a parameter mean, by the end of its path; the leading layer axis of a stack is
# left out. "embed" is the width of the residual stream: every matrix has it once.
_PARAMETER_AXES = (
    ("embed_tokens.embedding", ("vocab", "embed")),
    ("lm_head.kernel", ("embed", "vocab")),
    ("patch_embedding.kernel", (None, "embed")),
    ("experts.gate_proj.kernel", ("expert", "embed", None)),
    ("experts.up_proj.kernel", ("expert", "embed", None)),
    ("experts.down_proj.kernel", ("expert", "mlp", "embed")),
    ("attn.proj.kernel", ("heads", "embed")),
    ("attn.o_proj.kernel", ("heads", "embed")),
    ("mlp.fc2.kernel", ("mlp", "embed")),
    ("mlp.down_proj.kernel", ("mlp", "embed")),
    ("merger.fc2.kernel", ("mlp", "embed")),
    ("kernel", ("embed", None)),  # qkv, q/k/v, fc1, gate, up
)

# Axis meaning -> mesh axis. FSDP cuts every matrix along its embed axis.
_MESH_AXIS = {"embed": "fsdp", "vocab": None, "heads": None, "mlp": None, "expert": None}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that are left."""

    data: int = 1
    fsdp: int = -1

    def sizes(self, devices: int) -> dict[str, int]:
        """Axis sizes for that many devices; raises ConfigError where they do not multiply up."""
        sizes = dataclasses.asdict(self)
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
            raise ConfigError(f"mesh {sizes}: sizes must be positive, and at most one -1.")
        known = math.prod(size for size in sizes.values() if size != -1)
        if free:
            sizes[free[0]] = devices // known
        if math.prod(sizes.values()) != devices:
            raise ConfigError(
                f"mesh {dataclasses.asdict(self)} does not use the {devices} devices there are; "
                "set mesh.data * mesh.fsdp to their number, or one of the two to -1."
            )
        return sizes


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all processes (or the given ones)."""
    sizes = config.sizes(len(devices or jax.devices()))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Sharding of the parameter at a dotted path.

    Vectors are replicated, and so is a matrix whose axis the mesh axis does not divide (that is
    never so for the released sizes on meshes of powers of two).
    """
    axes = next((axes for end, axes in _PARAMETER_AXES if path.endswith(end)), None)
    if axes is None:
        return P()
    names = [_MESH_AXIS.get(axis) for axis in axes]
    names = [None] * (len(shape) - len(axes)) + names
    names = [
        name if name and size % mesh.shape[name] == 0 else None
        for name, size in zip(names, shape, strict=True)
    ]
    return P(*names)


def path_string(path: tuple[Any, ...]) -> str:
    """A jax key path as a dotted name, e.g. encoder.layers.attn.qkv.kernel."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """NamedSharding for every leaf of a tree of arrays or shapes, by the names of its path.

    Optimizer moments lie in trees of the same paths and follow the same rules.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(path_string(path), np.shape(leaf), mesh))

    return jax.tree_util.tree_map_with_path(one, params)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Batch arrays are cut along their pack axis, which follows `leading` uncut ones."""
    return NamedSharding(mesh, P(*[None] * leading, BATCH_AXES))


def data_shards(mesh: Mesh | Mapping[str, int]) -> int:
    """How many packs the mesh holds side by side."""
    shape = mesh.shape if isinstance(mesh, Mesh) else mesh
    return math.prod(shape[axis] for axis in BATCH_AXES)


def row_mesh(x: jax.Array) -> AbstractMesh | None:
    """The mesh that an activation's rows [rows ...] are cut over, if they are.

    Without a mesh (one device, verification, generation) they are not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or x.shape[0] % data_shards(mesh.shape) else mesh


def shard_rows(x: jax.Array) -> jax.Array:
    """States that an activation's rows [rows ...] are cut over the batch axes."""
    if row_mesh(x) is None:
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


def gather(x: jax.Array) -> jax.Array:
    """States that a parameter is whole on every device here.

    Before a loop that uses it at every turn: the partitioner would gather it anew inside.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P())


def gather_axes(x: jax.Array, spec: P) -> jax.Array:
    """Inside a shard_map: the whole of a parameter that came in cut by `spec`.

    The gradient comes out as a reduce-scatter, cut like the parameter.
    """
    for axis, name in enumerate(spec):
        if name is not None:
            x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x
