"""Rotary position embeddings: (t, h, w) of the encoder, 1-D of the decoder. All float32."""

import jax
import jax.numpy as jnp
import numpy as np

Rope = tuple[jax.Array, jax.Array]  # cos, sin: float32 [... head_dim]


def vision_rope(patch_positions: jax.Array, *, head_dim: int, theta: float) -> Rope:
    """patch_positions int [... 3] of (t, h, w) -> cos, sin [... head_dim].

    Half the head's size of frequencies is split 4:6:6 between t, h and w; on each axis
    freq_k = theta^(-k / size). The table repeats them, [f, f], while `rotate_neighbours` pairs
    neighbours: a mix, but the one that the released weights were trained with.
    """
    unit = head_dim // 2 // 16
    parts = []
    for axis, size in enumerate((4 * unit, 6 * unit, 6 * unit)):
        frequency = 1 / np.float32(theta) ** (np.arange(size, dtype=np.float32) / size)
        parts.append(patch_positions[..., axis, None].astype(jnp.float32) * frequency)
    half = jnp.concatenate(parts, -1)
    angles = jnp.concatenate([half, half], -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_neighbours(x: jax.Array, rope: Rope) -> jax.Array:
    """x [... heads head_dim], (x0, x1) -> (-x1, x0) in every pair of neighbours."""
    cos, sin = (t[..., None, :] for t in rope)
    z = x.astype(jnp.float32)
    pairs = z.reshape(*z.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(z.shape)
    return (z * cos + turned * sin).astype(x.dtype)


def text_rope(positions: jax.Array, *, head_dim: int, theta: float) -> Rope:
    """positions int [...] -> cos, sin [... head_dim], as in Qwen3."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    half = positions[..., None].astype(jnp.float32) * (1 / np.float32(theta) ** exponent)
    angles = jnp.concatenate([half, half], -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_half(x: jax.Array, rope: Rope) -> jax.Array:
    """x [... heads head_dim], the first half paired with the second."""
    cos, sin = (t[..., None, :] for t in rope)
    z = x.astype(jnp.float32)
    first, second = jnp.split(z, 2, -1)
    turned = jnp.concatenate([-second, first], -1)
    return (z * cos + turned * sin).astype(x.dtype)
