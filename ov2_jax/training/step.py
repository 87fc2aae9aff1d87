"""The train step: a whole optimizer step, from a batch of micro-steps to new parameters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32

from ov2_jax.config.optimizer import OptimizerConfig
from ov2_jax.core.batch import IGNORE, Batch
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.model.moe.mixture import RouterLoad, load_balancing_loss, load_metrics
from ov2_jax.sharding.exchange import axis_size, total, whole_parameters
from ov2_jax.sharding.mesh import AXES
from ov2_jax.sharding.rules import batch_specs, mesh_axes, parameter_specs, path_string
from ov2_jax.training.loss import loss_weights, weighted_cross_entropy
from ov2_jax.training.optimizer import (
    Tree,
    join,
    learning_rate_schedule,
    make_optimizer,
    split_trainable,
)
from ov2_jax.training.state import Metrics, TrainState


class Losses(NamedTuple):
    """The reported terms of a loss. They add up over micro-steps and devices."""

    next_token: Float32[Array, ""]  # weighted sum over tokens
    # Of a mixture of experts: the load-balancing loss without its coefficient, and its inputs.
    balance: Float32[Array, ""] | None = None
    load: RouterLoad | None = None


def batch_loss(
    graph: nnx.GraphDef,
    params: Tree,
    batch: Batch,
    weights: Float32[Array, "G B L"],
    *,
    micro_steps: int,
) -> tuple[Float32[Array, ""], Losses]:
    """This device's share of what one micro-step's batch adds to the loss, and its terms.

    The sum of weight * token loss, and for a mixture of experts the load-balancing loss of the
    batch's real tokens on all devices times `router_aux_loss_coef` / `micro_steps`.
    """
    dtype = jnp.dtype(nnx.merge(graph, params).decoder.compute.dtype)
    model: LlavaOnevision2 = nnx.merge(graph, _outside_layers(params, dtype))
    hidden, collected = model(batch)
    rows = hidden.shape[:2]
    loss = weighted_cross_entropy(
        hidden,
        model.decoder.head(),
        batch.targets.reshape(rows),
        weights.reshape(rows),
        block=model.decoder.compute.loss_block,
    )
    if collected.load is None:
        return loss, Losses(loss)
    load = total(collected.load)  # not linear in tokens: first the sum, then the loss
    balance = load_balancing_loss(load) / micro_steps / axis_size(*AXES)
    whole = loss + model.config.router_aux_loss_coef * balance
    return whole, Losses(loss, balance, jax.tree.map(lambda x: x / axis_size(*AXES), load))


def loss_and_grads(
    graph: nnx.GraphDef, trainable: Tree, frozen: Tree, batch: Batch, reduction: str
) -> tuple[Losses, Tree]:
    """Losses and gradients of a whole step's batch, every leaf [A ...] for A micro-steps.

    The weights are made once over all micro-steps and sum to 1, so sums of losses and gradients
    are exact, however the step is cut. The load-balancing loss is not linear in tokens: the step's
    is the mean of its micro-steps'.

    Under a mesh (`jax.set_mesh`, with the axes of sharding/mesh.py) every device runs the same
    program on its part of the batch; sharding/exchange.py has what they exchange.
    """

    def on_device(trainable: Tree, frozen: Tree, batch: Batch) -> tuple[Losses, Tree]:
        losses, grads = _own_loss_and_grads(graph, trainable, frozen, batch, reduction)
        return total(losses), _summed(grads)

    if jax.sharding.get_abstract_mesh().empty:
        return on_device(trainable, frozen, batch)
    specs = parameter_specs(trainable)
    run = jax.shard_map(
        on_device,
        in_specs=(specs, parameter_specs(frozen), batch_specs(len(batch.vision))),
        out_specs=(P(), specs),
        # Unchecked: Pallas kernels do not say over which axes their results vary.
        check_vma=False,
    )
    return run(trainable, frozen, batch)


def _outside_layers(params: Tree, dtype: jnp.dtype) -> Tree:
    """Parameters, gathered except the stacks of layers, which are gathered a layer at a time."""
    flat = traverse_util.flatten_dict(params)
    stacks = {path: x for path, x in flat.items() if "layers" in path}
    rest = {path: x for path, x in flat.items() if "layers" not in path}
    rest = whole_parameters(traverse_util.unflatten_dict(rest), dtype)
    return traverse_util.unflatten_dict(stacks | traverse_util.flatten_dict(rest))


def _summed(grads: Tree) -> Tree:
    """Gradients summed along the mesh axes along which their parameters are whole."""

    def one(path: tuple[Any, ...], x: Array) -> Array:
        cut = mesh_axes(path_string(path))
        return total(x, tuple(axis for axis in AXES if axis not in cut))

    return jax.tree_util.tree_map_with_path(one, grads)


def _own_loss_and_grads(
    graph: nnx.GraphDef, trainable: Tree, frozen: Tree, batch: Batch, reduction: str
) -> tuple[Losses, Tree]:
    """A device's share of losses and gradients."""
    weights = loss_weights(batch.targets, reduction)
    micro_steps = weights.shape[0]

    def loss(trainable: Tree, batch: Batch, weights: Array) -> tuple[Array, Losses]:
        params = join(trainable, frozen)
        return batch_loss(graph, params, batch, weights, micro_steps=micro_steps)

    def micro(batch: Batch, weights: Array) -> tuple[Losses, Tree]:
        grads, losses = jax.grad(loss, has_aux=True)(trainable, batch, weights)
        return losses, grads

    one = jax.tree.map(lambda x: x[0], (batch, weights))
    if micro_steps == 1:
        return micro(*one)

    def add(so_far: tuple, xs: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, so_far, micro(*xs)), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro, *one))
    return jax.lax.scan(add, zero, (batch, weights))[0]


def make_train_step(
    graph: nnx.GraphDef, config: OptimizerConfig, *, steps: int, reduction: str
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step as a pure function; the caller jits it and donates the state."""
    optimizer = make_optimizer(config)
    schedules = {part: learning_rate_schedule(config, part, steps) for part in config.train}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, frozen = split_trainable(state.params, config)
        losses, grads = loss_and_grads(graph, trainable, frozen, batch, reduction)
        norms = {part: optax.tree.norm(grads[part]) for part in grads}
        norm = jnp.sqrt(sum(n**2 for n in norms.values()))
        finite = jnp.isfinite(losses.next_token) & jnp.isfinite(norm)

        rates = {part: schedules[part](state.step) for part in grads}
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        updates = {part: optax.tree.scale(-rates[part], tree) for part, tree in updates.items()}
        trained = optax.apply_updates(trainable, updates)

        keep = functools.partial(jnp.where, finite)
        trained = jax.tree.map(keep, trained, trainable)
        opt_state = jax.tree.map(keep, opt_state, state.opt_state)
        skipped = 1 - finite.astype(jnp.int32)
        new = TrainState(
            step=state.step + 1,
            params=join(trained, frozen),
            opt_state=opt_state,
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        )
        metrics = {
            "loss": losses.next_token,
            "grad_norm": norm,
            "tokens": jnp.sum(batch.segment_ids > 0),
            "supervised_tokens": jnp.sum(batch.targets != IGNORE),
            "patches": sum((jnp.sum(v.segment_ids > 0) for v in batch.vision), jnp.int32(0)),
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
            **{f"grad_norm/{part}": n for part, n in norms.items()},
            **{f"learning_rate/{part}": r for part, r in rates.items()},
        }
        if losses.load is not None:
            metrics |= {"moe/aux_loss": losses.balance, **load_metrics(losses.load)}
        return new, metrics

    return train_step
