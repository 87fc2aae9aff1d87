"""Next-token loss over packed rows, without ever holding all logits.

Everything here sees a device's own tokens, and under tensor parallelism a part of the words.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Shaped

from ov2_jax.core.batch import IGNORE
from ov2_jax.sharding.exchange import axis_index, axis_size, gather_tokens, maximum, total
from ov2_jax.sharding.mesh import PACK_AXES, ROW_AXES


def loss_weights(targets: Int[Array, "A G B L"], reduction: str) -> Float32[Array, "A G B L"]:
    """Weights of a whole optimizer step's tokens, which sum to 1 over all devices.

    "tokens": every supervised token weighs the same, in whatever micro-step, device or row it is.
    "rows": the mean over rows of each row's token mean (the public reference's reduction); a row
    without supervised tokens contributes nothing. If nothing is supervised, all weights are zero.
    """
    supervised = (targets != IGNORE).astype(jnp.float32)
    if reduction == "tokens":
        return supervised / jnp.maximum(total(supervised.sum()), 1)
    per_row = total(supervised.sum(-1, keepdims=True), ROW_AXES)
    rows = total((per_row > 0).sum(), PACK_AXES)
    return supervised / jnp.maximum(per_row, 1) / jnp.maximum(rows, 1)


def weighted_cross_entropy(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B L"],
    weights: Float32[Array, "B L"],
    *,
    block: int,
) -> Float32[Array, ""]:
    """Sum over tokens of weight * -log p(target): this device's share of it.

    The weight of a token whose target is IGNORE must be 0. Logits exist for `block` tokens of every
    row at a time. Both gradients are made together with the loss, from the same logits: the
    backward pass only scales them.
    """
    hidden, targets, weights = (gather_tokens(x) for x in (hidden, targets, weights))
    return _cross_entropy(hidden, head.astype(hidden.dtype), targets, weights, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B L"],
    weights: Float32[Array, "B L"],
    block: int,
) -> Float32[Array, ""]:
    def add_block(loss: Array, xs: tuple[Array, ...]) -> tuple[Array, None]:
        return loss + _block_loss(head, *xs)[0], None

    xs = tuple(_split(x, block) for x in (hidden, targets, weights))
    return jax.lax.scan(add_block, jnp.float32(0), xs)[0] / axis_size("tensor")


def _forward(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B L"],
    weights: Float32[Array, "B L"],
    block: int,
) -> tuple[Float32[Array, ""], tuple[Float[Array, "B L D"], Float[Array, "D V"]]]:
    """The loss, and its gradients for hidden states and head."""

    def add_block(carry: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple[tuple, Array]:
        loss, d_head = carry
        here, d_logits = _block_loss(head, *xs)
        d_logits = d_logits.astype(head.dtype)
        d_head += jnp.einsum("bld,blv->dv", xs[0], d_logits, preferred_element_type=jnp.float32)
        return (loss + here, d_head), jnp.einsum("blv,dv->bld", d_logits, head)

    xs = tuple(_split(x, block) for x in (hidden, targets, weights))
    zero = jnp.float32(0), jnp.zeros(head.shape, jnp.float32)
    (loss, d_head), d_hidden = jax.lax.scan(add_block, zero, xs)  # blocks B block D
    rows, length, width = hidden.shape
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(rows, -1, width)[:, :length]  # B L D
    # Every device of a tensor group has the loss of all its tokens, and each a part of the words:
    # the shares of the loss are equal parts, those of the gradients are not.
    return loss / axis_size("tensor"), (d_hidden, d_head.astype(head.dtype))


def _backward(
    block: int,
    saved: tuple[Float[Array, "B L D"], Float[Array, "D V"]],
    gradient: Float32[Array, ""],
) -> tuple[Float[Array, "B L D"], Float[Array, "D V"], None, None]:
    del block
    return *((gradient * x).astype(x.dtype) for x in saved), None, None


_cross_entropy.defvjp(_forward, _backward)


def _split(x: Shaped[Array, "B L *rest"], block: int) -> Shaped[Array, "blocks B block *rest"]:
    """Cuts rows into blocks of tokens, padded with zeros."""
    blocks = -(-x.shape[1] // block)
    block = min(block, x.shape[1])
    x = jnp.pad(x, [(0, 0), (0, blocks * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, block, *x.shape[2:]), 1, 0)


def _block_loss(
    head: Float[Array, "D V"],
    hidden: Float[Array, "B block D"],
    targets: Int[Array, "B block"],
    weights: Float32[Array, "B block"],
) -> tuple[Float32[Array, ""], Float32[Array, "B block V"]]:
    """The loss of one block of tokens, and its gradient for the logits."""
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    most = maximum(logits.max(-1, keepdims=True), ("tensor",))
    exp = jnp.exp(logits - most)
    normaliser = total(exp.sum(-1, keepdims=True), ("tensor",))
    words = jnp.arange(logits.shape[-1]) + axis_index("tensor") * logits.shape[-1]
    is_target = words == targets[..., None]
    target = total(jnp.sum(jnp.where(is_target, logits, 0), -1), ("tensor",))
    log_p = target - most[..., 0] - jnp.log(normaliser[..., 0])
    return -jnp.sum(weights * log_p), weights[..., None] * (exp / normaliser - is_target)
