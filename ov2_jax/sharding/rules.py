"""How parameters and the batch are cut over the mesh: a table of rules for each.

    axis      of the batch it cuts         of the parameters it cuts
    data      packs                        nothing: replicas; the only axis for slow networks
    fsdp      packs                        matrices, which are gathered layer by layer
    expert    packs                        experts; other matrices as on fsdp
    context   a pack's tokens, vision rows matrices, as on fsdp
    tensor    a pack's tokens, vision rows the decoder's heads, MLPs and vocabulary

exchange.py moves them between devices.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from ov2_jax.core.batch import Batch, VisionRows
from ov2_jax.sharding.mesh import PACK_AXES, ROW_AXES

# The meaning of a parameter's axes, by the end of its path, without the leading layer axis of a
# stack. Vectors are not listed: every device has the whole of them.
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

# Axis meaning -> mesh axes that are gathered when the parameter is used. "width" and "router" are
# widths of matrices that tensor parallelism leaves whole: those of encoder and merger, and the
# router, the only matrix that is never cast to a smaller type.
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


# --- parameters -----------------------------------------------------------------------------------


def parameter_axes(path: str) -> tuple[str | None, ...] | None:
    """The meanings of the last axes of the parameter at a dotted path, None if it is not cut."""
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
    """The tree with a PartitionSpec for every array or shape, by the names of its path.

    Optimizer moments have trees with the same paths and follow the same rules.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: parameter_spec(path_string(path), np.ndim(leaf)), params
    )


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """`parameter_specs` as NamedShardings of a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_specs(params))


# --- the batch ------------------------------------------------------------------------------------


def batch_specs(classes: int) -> Any:
    """A Batch of PartitionSpecs for a step's arrays [A G ...] and `classes` classes of vision rows.

    Text rows are cut along their tokens; each vision row goes whole to one device.
    """
    tokens = P(None, PACK_AXES, None, ROW_AXES)  # A G B L
    rows = P(None, PACK_AXES, ROW_AXES)  # A G R ...
    return Batch(*[tokens] * 5, (VisionRows(rows, rows, rows),) * classes)


def batch_shardings(mesh: Mesh, classes: int) -> Any:
    """`batch_specs` as NamedShardings of a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), batch_specs(classes))


def token_order(length: int, context: int) -> Int[np.ndarray, " L"]:
    """The order of a row's tokens when rows are cut over `context` devices; `length` is L.

    A causal query late in a row sees more keys than an early one. The row is cut into 2 * context
    pieces, and device i has pieces i and 2 * context - 1 - i, so that all have the same work.
    """
    if context == 1:
        return np.arange(length)
    pieces = np.arange(length).reshape(2 * context, -1)
    early, late = pieces[:context], pieces[context:][::-1]
    return np.stack([early, late], 1).reshape(-1)
