"""Attention inside segments: the one operation that keeps windows and samples apart.

A backend is a function (q [B Q H D], k [B K J D], v [B K J D], Segments) -> [B Q H D]. All compute
the same, softmax in float32; padding gives zeros.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.model.attention import plain, splash, triton, xla
from ov2_jax.model.attention.blocks import Segments, row_segments, visible, visited_blocks
from ov2_jax.model.attention.plain import masked_attention

__all__ = [
    "KERNELS",
    "Segments",
    "attention",
    "choose",
    "first_working",
    "for_platform",
    "kernel_of",
    "masked_attention",
    "row_segments",
    "visible",
    "visited_blocks",
]


class Kernel(NamedTuple):
    attention: Callable[..., jax.Array]
    platforms: tuple[str, ...]
    computed_scores: Callable[..., Any]  # what it costs: entries of the score matrix, a head

    def is_supported(self, platform: str) -> bool:
        return platform in self.platforms


# In order of preference.
KERNELS = {
    "splash": Kernel(splash.attention, ("tpu",), splash.computed_scores),
    "triton": Kernel(triton.attention, ("gpu",), triton.computed_scores),
    "xla": Kernel(xla.attention, ("tpu", "gpu", "cpu"), xla.computed_scores),
}


@functools.cache
def choose(order: Sequence[str], platform: str) -> str:
    """The first backend of `order` that runs on "tpu", "gpu" or "cpu"; raises ConfigError."""
    for name in order:
        if KERNELS[name].is_supported(platform):
            return name
    raise ConfigError(f"compute.attention {tuple(order)} has nothing that runs on a {platform}.")


def kernel_of(compute: ComputeConfig) -> str:
    """The one kernel that is left of the preferences, or the first that these devices run."""
    if len(compute.attention) == 1:
        return compute.attention[0]
    return choose(compute.attention, jax.default_backend())


def for_platform(compute: ComputeConfig, platform: str) -> ComputeConfig:
    """With the one attention kernel that is taken on "tpu", "gpu" or "cpu"."""
    return dataclasses.replace(compute, attention=(choose(compute.attention, platform),))


def first_working(order: Sequence[str]) -> tuple[str, list[str]]:
    """The first backend of `order` that compiles here and is right, and why others are not taken.

    Kernels depend on the very chip and driver. A row of three samples and padding is run through
    each, forward and backward, before a run relies on it; not so the last, which has no other
    behind it.
    """
    notes = []
    supported = [name for name in order if KERNELS[name].is_supported(jax.default_backend())]
    for name in supported:
        if name == supported[-1]:
            return name, notes
        try:
            error = _error_of(KERNELS[name].attention)
        except Exception as e:  # whatever a compiler raises: the next one is tried
            notes.append(f"Attention kernel {name} is not used: {type(e).__name__}: {str(e)[:500]}")
            continue
        if error < 0.02:
            return name, notes
        notes.append(f"Attention kernel {name} is not used: its results are off by {error:.2g}.")
    raise ConfigError(
        f"compute.attention {tuple(order)} has nothing that works on a {jax.default_backend()}."
    )


def _error_of(backend: Callable[..., jax.Array]) -> float:
    """Difference from the whole score matrix over its norm, the largest of result and gradients.
    In bfloat16 right ones have some 0.005."""
    ids = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([100, 300, 60, 52]))[None]
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (1, 512, 4, 128), (1, 512, 2, 128), (1, 512, 2, 128)
    qkv = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]
    segments = row_segments(ids, causal=True)

    @functools.partial(jax.jit, static_argnums=0)
    def run(attention: Callable[..., jax.Array], qkv: list[jax.Array]) -> list[jax.Array]:
        out, pull = jax.vjp(lambda *x: attention(*x, segments), *qkv)
        return [out, *pull(out)]

    got, want = (jax.device_get(run(f, qkv)) for f in (backend, plain.attention))
    got, want = ([x.astype("float32") for x in side] for side in (got, want))
    return max(
        float(jnp.linalg.norm(g - w) / jnp.linalg.norm(w)) for g, w in zip(got, want, strict=True)
    )


def attention(
    q: jax.Array,  # [B Q H D]
    k: jax.Array,  # [B K J D]
    v: jax.Array,  # [B K J D]
    segments: Segments,
    *,
    kernel: str,
) -> jax.Array:
    """Softmax attention of every token to its own segment, [B Q H D] in q's dtype."""
    return KERNELS[kernel].attention(q, k, v, segments)
