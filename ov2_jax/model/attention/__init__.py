"""Attention inside segments: the one operation that keeps windows and samples apart.

A backend is a function (q [B Q H D], k [B K J D], v [B K J D], Segments) -> [B Q H D]. All compute
the same, softmax in float32; padding gives zeros.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from ov2_jax.model.attention import plain, splash
from ov2_jax.model.attention.blocks import Segments, row_segments, visible, visited_blocks
from ov2_jax.model.attention.plain import masked_attention

__all__ = [
    "BACKENDS",
    "Segments",
    "attention",
    "choose",
    "masked_attention",
    "row_segments",
    "visible",
    "visited_blocks",
]


class Backend(NamedTuple):
    attention: Callable[..., jax.Array]
    platforms: tuple[str, ...]

    def is_supported(self, platform: str) -> bool:
        return platform in self.platforms


# In order of preference.
BACKENDS = {
    "splash": Backend(splash.attention, ("tpu",)),
    "xla": Backend(plain.attention, ("tpu", "gpu", "cpu")),
}


@functools.cache
def choose(order: Sequence[str], platform: str) -> str:
    """The first backend of `order` that runs on "tpu", "gpu" or "cpu"; raises ValueError."""
    for name in order:
        if BACKENDS[name].is_supported(platform):
            return name
    raise ValueError(f"compute.attention {tuple(order)} has nothing that runs on a {platform}.")


def attention(
    q: jax.Array,  # [B Q H D]
    k: jax.Array,  # [B K J D]
    v: jax.Array,  # [B K J D]
    segments: Segments,
    *,
    backends: Sequence[str],
) -> jax.Array:
    """Softmax attention of every token to its own segment, [B Q H D] in q's dtype."""
    return BACKENDS[backends[0]].attention(q, k, v, segments)
