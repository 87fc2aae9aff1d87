"""What lies where: the mesh, and one table of rules for parameters and one for the batch.

    data      replicas; the only axis that may cross slices or slow networks
    fsdp      packs; parameters are cut over it and gathered layer by layer
    expert    packs; experts lie apart on it, everything else as on fsdp
    context   a pack's tokens and vision rows; parameters as on fsdp
    tensor    a pack's tokens and vision rows; heads, MLPs and the vocabulary of the decoder

parallel.py has what devices exchange.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ov2_jax.data.batch import Batch, VisionRows
from ov2_jax.data.config import PackConfig
from ov2_jax.model.config import ConfigError, ModelConfig

AXES = ("data", "fsdp", "expert", "context", "tensor")
PACK_AXES = ("data", "fsdp", "expert")  # cut the packs of a batch
ROW_AXES = ("context", "tensor")  # cut what a pack holds: tokens of a text row, vision rows

# What the axes of a parameter mean, by the end of its path; the leading layer axis of a stack is
# left out. Vectors are not listed: they are whole everywhere.
_PARAMETERS = (
    ("embed_tokens.embedding", ("vocab", "embed")),
    ("lm_head.kernel", ("embed", "vocab")),
    ("q_proj.kernel", ("embed", "heads")),
    ("k_proj.kernel", ("embed", "heads")),
    ("v_proj.kernel", ("embed", "heads")),
    ("o_proj.kernel", ("heads", "embed")),
    ("experts.gate_proj.kernel", ("expert", "expert_embed", "mlp")),
    ("experts.up_proj.kernel", ("expert", "expert_embed", "mlp")),
    ("experts.down_proj.kernel", ("expert", "mlp", "expert_embed")),
    ("mlp.gate_proj.kernel", ("embed", "mlp")),
    ("mlp.up_proj.kernel", ("embed", "mlp")),
    ("mlp.down_proj.kernel", ("mlp", "embed")),
    ("mlp.gate.kernel", ("router", None)),
    ("patch_embedding.kernel", (None, "width")),
    ("attn.qkv.kernel", ("width", None)),
    ("attn.proj.kernel", (None, "width")),
    ("fc1.kernel", ("width", None)),
    ("fc2.kernel", (None, "width")),
)

# Axis meaning -> mesh axes that are gathered where the parameter is used. "width" and "router" are
# the widths of matrices which tensor parallelism leaves whole: encoder and merger, and the router,
# which alone is never cast to a smaller type.
GATHERED = {
    "embed": ("fsdp", "expert", "context"),
    "expert_embed": ("fsdp", "context"),
    "width": ("fsdp", "expert", "context", "tensor"),
    "router": ("fsdp", "expert", "context", "tensor"),
}
_MESH_AXES = GATHERED | {
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that are left."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1

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
                "make the product of its axes their number, or set one of them to -1."
            )
        return sizes


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all processes (or the given ones)."""
    sizes = config.sizes(len(devices or jax.devices()))
    # Splitting allowed: an axis need not be a product of whole sides of a TPU's torus.
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def data_shards(mesh: Mesh | AbstractMesh | Mapping[str, int]) -> int:
    """How many packs the mesh holds side by side."""
    return _size(mesh, PACK_AXES)


def _size(mesh: Mesh | AbstractMesh | Mapping[str, int], axes: tuple[str, ...]) -> int:
    shape = mesh if isinstance(mesh, Mapping) else mesh.shape
    return math.prod(shape[axis] for axis in axes)


def check_mesh(sizes: Mapping[str, int], model: ModelConfig, pack: PackConfig) -> None:
    """Raises ConfigError where an axis does not divide what is cut over it."""
    text, vision = model.text, model.vision
    cut: list[tuple[tuple[str, ...], str, int]] = [
        (GATHERED["embed"], "model.text.hidden_size", text.hidden_size),
        (GATHERED["width"], "model.vision.hidden_size", vision.hidden_size),
        (GATHERED["width"], "model.text.hidden_size", text.hidden_size),
        (("tensor",), "model.text.num_key_value_heads", text.num_key_value_heads),
        (("tensor",), "model.text.vocab_size", text.vocab_size),
    ]
    if text.num_experts:
        cut += [
            (("expert",), "model.text.num_experts", text.num_experts),
            (("tensor",), "model.text.moe_intermediate_size", text.moe_intermediate_size),
        ]
    else:
        cut += [(("tensor",), "model.text.intermediate_size", text.intermediate_size)]
        if sizes["expert"] > 1:
            raise ConfigError(
                f"mesh.expert is {sizes['expert']}, but a dense decoder has no experts; use fsdp."
            )
    cut += [
        (ROW_AXES, f"the number of rows of pack.vision_rows[{i}]", rows)
        for i, (rows, _) in enumerate(pack.vision_rows)
    ]
    for axes, name, size in cut:
        if size % _size(sizes, axes):
            what = " x ".join(f"mesh.{axis}" for axis in axes if sizes[axis] > 1)
            raise ConfigError(
                f"{what} is {_size(sizes, axes)}, which does not divide {name} {size}; choose "
                "sizes that do."
            )
    # Every device of the context axis has two pieces of a row, one early and one late.
    pieces = 2 * sizes["context"] if sizes["context"] > 1 else 1
    if pack.seq_len % (pieces * sizes["tensor"]):
        raise ConfigError(
            f"pack.seq_len {pack.seq_len} does not divide into {pieces} pieces for mesh.context "
            f"{sizes['context']}, and those over mesh.tensor {sizes['tensor']}; use a multiple of "
            f"{pieces * sizes['tensor']}."
        )


# --- parameters -----------------------------------------------------------------------------------


def parameter_axes(path: str) -> tuple[str | None, ...] | None:
    """The meanings of the last axes of the parameter at a dotted path; None: whole everywhere."""
    return next((axes for end, axes in _PARAMETERS if path.endswith(end)), None)


def parameter_spec(path: str, ndim: int) -> P:
    """How the parameter at a dotted path is cut."""
    axes = parameter_axes(path) or ()
    return P(*[None] * (ndim - len(axes)), *(_MESH_AXES.get(axis) for axis in axes))


def mesh_axes(path: str) -> set[str]:
    """The mesh axes over which the parameter at a dotted path is cut."""
    axes = parameter_axes(path) or ()
    return {name for axis in axes for name in _MESH_AXES.get(axis, ())}


def path_string(path: tuple[Any, ...]) -> str:
    """A jax key path as a dotted name, e.g. encoder.layers.attn.qkv.kernel."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def parameter_specs(params: Any) -> Any:
    """PartitionSpec for every leaf of a tree of arrays or shapes, by the names of its path.

    Optimizer moments lie in trees of the same paths and follow the same rules.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: parameter_spec(path_string(path), np.ndim(leaf)), params
    )


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """The same as NamedShardings of a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_specs(params))


# --- the batch ------------------------------------------------------------------------------------


def batch_specs(classes: int, *, leading: int = 0) -> Batch:
    """PartitionSpecs of a batch with so many classes of vision rows, behind `leading` whole axes.

    Text rows are cut along their tokens, vision rows are dealt out.
    """
    none = [None] * leading
    tokens = P(*none, PACK_AXES, None, ROW_AXES)
    rows = P(*none, PACK_AXES, ROW_AXES)
    return Batch(*[tokens] * 5, (VisionRows(rows, rows, rows),) * classes)


def batch_shardings(mesh: Mesh, classes: int, *, leading: int = 0) -> Batch:
    """The same as NamedShardings of a mesh."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), batch_specs(classes, leading=leading))


def token_order(length: int, context: int) -> np.ndarray:
    """Which token of a row [length] lies at each place when rows are cut over `context` devices.

    A causal query late in a row sees more keys than an early one. The row is cut into 2 * context
    pieces, and device i has pieces i and 2 * context - 1 - i: all have the same work.
    """
    if context == 1:
        return np.arange(length)
    pieces = np.arange(length).reshape(2 * context, -1)
    early, late = pieces[:context], pieces[context:][::-1]
    return np.stack([early, late], 1).reshape(-1)
