"""Next-token loss over packed rows, without ever holding all logits.

Dimension letters: A micro-steps, G packs, B text rows, L tokens, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp

from ov2_jax.data.batch import IGNORE
from ov2_jax.model.config import ConfigError
from ov2_jax.sharding import gather

REDUCTIONS = ("tokens", "rows")


def loss_weights(targets: jax.Array, reduction: str) -> jax.Array:
    """targets int [A G B L] of a whole optimizer step -> float32 weights that sum to 1.

    "tokens": every supervised token weighs the same, whatever micro-step, device or row it is in.
    "rows": the mean over rows of each row's token mean (the public reference's reduction); a row
    with nothing supervised contributes nothing. All-zero where nothing is supervised at all.
    """
    if reduction not in REDUCTIONS:
        raise ConfigError(f"loss_reduction is {reduction!r}; it must be one of {REDUCTIONS}.")
    supervised = (targets != IGNORE).astype(jnp.float32)
    if reduction == "tokens":
        return supervised / jnp.maximum(supervised.sum(), 1)
    per_row = supervised.sum(-1, keepdims=True)
    rows = (per_row > 0).sum()
    return supervised / jnp.maximum(per_row, 1) / jnp.maximum(rows, 1)


def weighted_cross_entropy(
    hidden: jax.Array,  # [rows L D]
    head: jax.Array,  # [D V]
    targets: jax.Array,  # int [rows L]
    weights: jax.Array,  # float32 [rows L], 0 where the target is IGNORE
    *,
    block: int,
) -> jax.Array:
    """Sum over tokens of weight * -log p(target), a float32 scalar.

    Logits exist for `block` tokens of every row at a time, in both passes.
    """
    rows, length, width = hidden.shape
    head = gather(head.astype(hidden.dtype))
    blocks = -(-length // block)
    padding = blocks * block - length

    def split(x: jax.Array) -> jax.Array:  # [rows L ...] -> [blocks rows block ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, blocks, -1, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add_block(total: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        h, t, w = xs
        logits = jnp.matmul(h, head, preferred_element_type=jnp.float32)
        target = jnp.take_along_axis(logits, jnp.maximum(t, 0)[..., None], -1)[..., 0]
        return total + jnp.sum(w * (jax.nn.logsumexp(logits, -1) - target)), None

    xs = (split(hidden), split(targets), split(weights))
    if blocks == 1:
        return add_block(jnp.float32(0), jax.tree.map(lambda x: x[0], xs))[0]
    return jax.lax.scan(add_block, jnp.float32(0), xs)[0]
