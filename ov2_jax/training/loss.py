"""Next-token loss over packed rows, without ever holding all logits.

Dimension letters: A micro-steps, G packs, B text rows, L tokens, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from ov2_jax.config.experiment import REDUCTIONS
from ov2_jax.core.batch import IGNORE
from ov2_jax.core.errors import ConfigError
from ov2_jax.sharding.exchange import axis_index, axis_size, gather_tokens, maximum, total
from ov2_jax.sharding.mesh import PACK_AXES, ROW_AXES


def loss_weights(targets: jax.Array, reduction: str) -> jax.Array:
    """targets int [A G B L] of a whole optimizer step -> float32 weights that sum to 1.

    "tokens": every supervised token weighs the same, whatever micro-step, device or row it is in.
    "rows": the mean over rows of each row's token mean (the public reference's reduction); a row
    with nothing supervised contributes nothing. All-zero where nothing is supervised at all.
    Targets and weights are a device's own; what they are divided by is counted over all devices.
    """
    if reduction not in REDUCTIONS:
        raise ConfigError(f"loss_reduction is {reduction!r}; it must be one of {REDUCTIONS}.")
    supervised = (targets != IGNORE).astype(jnp.float32)
    if reduction == "tokens":
        return supervised / jnp.maximum(total(supervised.sum()), 1)
    per_row = total(supervised.sum(-1, keepdims=True), ROW_AXES)
    rows = total((per_row > 0).sum(), PACK_AXES)
    return supervised / jnp.maximum(per_row, 1) / jnp.maximum(rows, 1)


def weighted_cross_entropy(
    hidden: jax.Array,  # [rows L D]
    head: jax.Array,  # [D V], under tensor parallelism a part of the words
    targets: jax.Array,  # int [rows L]
    weights: jax.Array,  # float32 [rows L], 0 where the target is IGNORE
    *,
    block: int,
) -> jax.Array:
    """Sum over tokens of weight * -log p(target), a float32 scalar: this device's share of it.

    Logits exist for `block` tokens of every row at a time. Both gradients are made beside the loss,
    from the same logits: the backward pass only scales them.
    """
    hidden, targets, weights = (gather_tokens(x) for x in (hidden, targets, weights))
    return _cross_entropy(hidden, head.astype(hidden.dtype), targets, weights, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, block: int
) -> jax.Array:
    def add_block(loss: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return loss + _block_loss(head, *xs)[0], None

    xs = tuple(_split(x, block) for x in (hidden, targets, weights))
    return jax.lax.scan(add_block, jnp.float32(0), xs)[0] / axis_size("tensor")


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, block: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def add_block(carry: tuple, xs: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        loss, d_head = carry
        here, d_logits = _block_loss(head, *xs)
        d_logits = d_logits.astype(head.dtype)
        d_head += jnp.einsum("rld,rlv->dv", xs[0], d_logits, preferred_element_type=jnp.float32)
        return (loss + here, d_head), jnp.einsum("rlv,dv->rld", d_logits, head)

    xs = tuple(_split(x, block) for x in (hidden, targets, weights))
    zero = jnp.float32(0), jnp.zeros(head.shape, jnp.float32)
    (loss, d_head), d_hidden = jax.lax.scan(add_block, zero, xs)
    rows, length, width = hidden.shape
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(rows, -1, width)[:, :length]
    # Every device of a tensor group has the loss of all its tokens, and each a part of the words:
    # the shares of the loss are equal parts, those of the gradients are not.
    return loss / axis_size("tensor"), (d_hidden, d_head.astype(head.dtype))


def _backward(
    block: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    del block
    return *((gradient * x).astype(x.dtype) for x in saved), None, None


_cross_entropy.defvjp(_forward, _backward)


def _split(x: jax.Array, block: int) -> jax.Array:
    """[rows L ...] -> [blocks rows block ...], padded with zeros."""
    blocks = -(-x.shape[1] // block)
    block = min(block, x.shape[1])
    x = jnp.pad(x, [(0, 0), (0, blocks * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, block, *x.shape[2:]), 1, 0)


def _block_loss(
    head: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss of one block [rows l D] and its gradient for the logits, float32 [rows l V]."""
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    most = maximum(logits.max(-1, keepdims=True), ("tensor",))
    exp = jnp.exp(logits - most)
    normaliser = total(exp.sum(-1, keepdims=True), ("tensor",))
    words = jnp.arange(logits.shape[-1]) + axis_index("tensor") * logits.shape[-1]
    is_target = words == targets[..., None]
    target = total(jnp.sum(jnp.where(is_target, logits, 0), -1), ("tensor",))
    log_p = target - most[..., 0] - jnp.log(normaliser[..., 0])
    return -jnp.sum(weights * log_p), weights[..., None] * (exp / normaliser - is_target)
