"""The attention kernels and the choice among them.

A kernel is a function (q [B Q H K], k [B T J K], v [B T J K], Segments) -> [B Q H K]. All compute
the same, with the softmax in float32; padding gives zeros.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.model.attention import plain, splash, triton, xla
from ov2_jax.model.attention.blocks import Segments, row_segments


class Kernel(NamedTuple):
    """A kernel, the platforms that run it, and its cost in entries of a head's score matrix."""

    attention: Callable[..., Float[Array, "B Q H K"]]
    platforms: tuple[str, ...]
    computed_scores: Callable[..., Any]

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
    """The first kernel of `order` that runs on "tpu", "gpu" or "cpu"; raises ConfigError."""
    for name in order:
        if KERNELS[name].is_supported(platform):
            return name
    raise ConfigError(f"compute.attention {tuple(order)} has nothing that runs on a {platform}.")


def kernel_of(compute: ComputeConfig) -> str:
    """The only kernel in the preferences, or else the first that these devices run."""
    if len(compute.attention) == 1:
        return compute.attention[0]
    return choose(compute.attention, jax.default_backend())


def for_platform(compute: ComputeConfig, platform: str) -> ComputeConfig:
    """The config with only the kernel that is chosen on "tpu", "gpu" or "cpu"."""
    return dataclasses.replace(compute, attention=(choose(compute.attention, platform),))


def first_working(order: Sequence[str]) -> tuple[str, list[str]]:
    """The first kernel of `order` that compiles here and is right, and why others are not used.

    Kernels depend on the exact chip and driver. Before a run relies on a kernel, a row of three
    samples and padding goes through it, forward and backward. The last kernel is not tried, because
    no other could replace it.
    """
    notes = []
    supported = [name for name in order if KERNELS[name].is_supported(jax.default_backend())]
    for name in supported:
        if name == supported[-1]:
            return name, notes
        try:
            error = _error_of(KERNELS[name].attention)
        except Exception as e:  # a compiler may raise anything: the next one is tried
            notes.append(f"Attention kernel {name} is not used: {type(e).__name__}: {str(e)[:500]}")
            continue
        if error < 0.02:
            return name, notes
        notes.append(f"Attention kernel {name} is not used: its results are off by {error:.2g}.")
    raise ConfigError(
        f"compute.attention {tuple(order)} has nothing that works on a {jax.default_backend()}."
    )


def _error_of(kernel: Callable[..., Float[Array, "B Q H K"]]) -> float:
    """How far a kernel is from plain attention: the norm of the difference over the norm, for the
    result and the gradients, the largest of them. Correct kernels have about 0.005 in bfloat16."""
    ids = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([100, 300, 60, 52]))[None]
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (1, 512, 4, 128), (1, 512, 2, 128), (1, 512, 2, 128)
    qkv = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]
    segments = row_segments(ids, causal=True)

    @functools.partial(jax.jit, static_argnums=0)
    def run(
        attention: Callable[..., Float[Array, "B Q H K"]], qkv: list[Float[Array, "..."]]
    ) -> list[Float[Array, "..."]]:
        out, pull = jax.vjp(lambda *x: attention(*x, segments), *qkv)
        return [out, *pull(out)]

    got, want = (jax.device_get(run(f, qkv)) for f in (kernel, plain.attention))
    got, want = ([x.astype("float32") for x in side] for side in (got, want))
    return max(
        float(jnp.linalg.norm(g - w) / jnp.linalg.norm(w)) for g, w in zip(got, want, strict=True)
    )


def attention(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T J K"],
    segments: Segments,
    *,
    kernel: str,
) -> Float[Array, "B Q H K"]:
    """Softmax attention of every token to its own segment, in q's dtype."""
    return KERNELS[kernel].attention(q, k, v, segments)
