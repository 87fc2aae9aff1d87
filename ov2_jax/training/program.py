"""The train step as one compiled program: what a run executes and what a planner compiles."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ov2_jax.config.experiment import Experiment
from ov2_jax.core.batch import Batch, VisionRows
from ov2_jax.model.attention import for_platform
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.sharding.rules import batch_shardings
from ov2_jax.training.start import abstract_train_state
from ov2_jax.training.state import AbstractState, TrainState
from ov2_jax.training.step import make_train_step

# Without it a reduce-scatter over all chips of a slice is compiled to an all-reduce: twice the
# bytes (jax 0.10.2, libtpu 0.0.42). Chips with SparseCores only.
_SCATTER = {"xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true"}
_COMPILER_OPTIONS = {"TPU v5": _SCATTER, "TPU v5p": _SCATTER, "TPU v6 lite": _SCATTER}


def model_graph(experiment: Experiment, platform: str) -> nnx.GraphDef:
    """The model without its parameters, to be merged with them inside a jitted function.

    `platform` ("cpu", "gpu", "tpu") decides which attention kernel it has.
    """
    compute = for_platform(experiment.compute, platform)

    def make() -> LlavaOnevision2:
        return LlavaOnevision2(experiment.model, rngs=nnx.Rngs(0), compute=compute)

    return nnx.split(nnx.eval_shape(make))[0]


def abstract_batch(experiment: Experiment, mesh: Mesh) -> Any:
    """The Batch of a step [A G ...], of ShapeDtypeStructs with shardings."""
    leading = experiment.grad_accum, experiment.packs_per_step // experiment.grad_accum
    pack, patch_dim = experiment.pack, experiment.model.vision.patch_dim

    def array(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *shape), dtype)

    tokens = array(pack.rows, pack.seq_len)
    vision = tuple(
        VisionRows(array(r, w, patch_dim, dtype=np.uint8), array(r, w, 3), array(r, w))
        for r, w in pack.vision_rows
    )
    shapes = Batch(tokens, tokens, tokens, tokens, tokens, vision)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        batch_shardings(mesh, len(vision)),
    )


def jit_train_step(experiment: Experiment, state: TrainState | AbstractState) -> Any:
    """The jitted step (state, batch) -> (state, metrics), which takes over the state's memory.

    `state` gives the shardings: real arrays or the abstract ones of `abstract_train_state`.
    """
    mesh = jax.tree.leaves(state)[0].sharding.mesh
    step = make_train_step(
        model_graph(experiment, mesh.devices.flat[0].platform),
        experiment.optimizer,
        steps=experiment.steps,
        reduction=experiment.loss_reduction,
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=_COMPILER_OPTIONS.get(mesh.devices.flat[0].device_kind),
    )


def lower_train_step(experiment: Experiment, mesh: Mesh) -> jax.stages.Lowered:
    """The step lowered for a mesh of real or of described devices, without any array."""
    state = abstract_train_state(experiment, mesh)
    with jax.set_mesh(mesh):
        return jit_train_step(experiment, state).lower(state, abstract_batch(experiment, mesh))
