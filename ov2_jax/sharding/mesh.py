"""The mesh: its axes, their sizes, and the devices on it."""

import dataclasses
import math
from collections.abc import Mapping

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ov2_jax.core.errors import ConfigError

AXES = ("data", "fsdp", "expert", "context", "tensor")
PACK_AXES = ("data", "fsdp", "expert")  # cut a batch into packs
ROW_AXES = ("context", "tensor")  # cut a pack: the tokens of a text row, the vision rows


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that are left."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def sizes(self, devices: int) -> dict[str, int]:
        """Axis sizes for `devices` devices; raises ConfigError if their product is not that."""
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
                "make the product of its axes their number, or set one of them to -1."
            )
        return sizes


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over the given devices, or over all devices of all processes."""
    sizes = config.sizes(len(devices or jax.devices()))
    # Splitting is allowed: an axis need not be a product of whole sides of a TPU's torus.
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def data_shards(mesh: Mesh | Mapping[str, int]) -> int:
    """How many packs the mesh holds at a time, one in each data shard."""
    return axes_size(mesh, PACK_AXES)


def axes_size(mesh: Mesh | Mapping[str, int], axes: tuple[str, ...]) -> int:
    """Devices along the axes together; `mesh` may be the sizes of its axes."""
    shape = mesh if isinstance(mesh, Mapping) else mesh.shape
    return math.prod(shape[axis] for axis in axes)
