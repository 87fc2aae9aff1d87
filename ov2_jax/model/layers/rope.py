"""Rotary position embeddings: (t, h, w) of the encoder, 1-D of the decoder. All float32."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

Rope = tuple[Float32[Array, "*any K"], Float32[Array, "*any K"]]  # cos, sin


def vision_rope(patch_positions: Int[Array, "*any 3"], *, head_dim: int, theta: float) -> Rope:
    """The rotation of patches at positions (t, h, w).

    There are K/2 frequencies, split 4:6:6 between t, h and w; on each axis
    freq_k = theta^(-k / size). The table repeats them, [f, f], but `rotate_neighbours` pairs
    neighbours: the two do not match, but the released weights were trained with this mix.
    """
    unit = head_dim // 2 // 16
    parts = []
    for axis, size in enumerate((4 * unit, 6 * unit, 6 * unit)):
        frequency = 1 / np.float32(theta) ** (np.arange(size, dtype=np.float32) / size)
        parts.append(patch_positions[..., axis, None].astype(jnp.float32) * frequency)
    half = jnp.concatenate(parts, -1)
    angles = jnp.concatenate([half, half], -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_neighbours(x: Float[Array, "*any H K"], rope: Rope) -> Float[Array, "*any H K"]:
    """Rotates every pair of neighbours: x * cos + (-x1, x0) * sin."""
    cos, sin = (t[..., None, :] for t in rope)
    z = x.astype(jnp.float32)
    pairs = z.reshape(*z.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(z.shape)
    return (z * cos + turned * sin).astype(x.dtype)


def text_rope(positions: Int[Array, "*any"], *, head_dim: int, theta: float) -> Rope:
    """The rotation of tokens at these positions, as in Qwen3."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    half = positions[..., None].astype(jnp.float32) * (1 / np.float32(theta) ** exponent)
    angles = jnp.concatenate([half, half], -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_half(x: Float[Array, "*any H K"], rope: Rope) -> Float[Array, "*any H K"]:
    """Rotates pairs of one channel in the first half of the head and one in the second half."""
    cos, sin = (t[..., None, :] for t in rope)
    z = x.astype(jnp.float32)
    first, second = jnp.split(z, 2, -1)
    turned = jnp.concatenate([-second, first], -1)
    return (z * cos + turned * sin).astype(x.dtype)
