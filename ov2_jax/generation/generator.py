"""Batched generation with a key/value cache: prompts in, texts out.

A batch has B prompts of up to L tokens; the cache has S slots, for L and the new tokens.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int32, PRNGKeyArray

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import Array, Batch
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.encoding.tokenizer import IM_END, Tokenizer, token_ids
from ov2_jax.data.packing.build import build_pack
from ov2_jax.data.packing.placement import Placement, WindowPlace
from ov2_jax.data.sample import EncodedSample
from ov2_jax.model.decoder import KVCache
from ov2_jax.model.llava_onevision2 import LlavaOnevision2

_TOKEN_STEP = 64  # prompts are padded to multiples of this, so that few shapes are compiled


class Sampling(NamedTuple):
    """temperature 0 is greedy; top_p keeps the likeliest tokens that together have that mass."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}; it must not be negative.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be in (0, 1].")


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def prompt_batch(
    prompts: Sequence[EncodedSample], config: ModelConfig
) -> tuple[Batch, Int32[np.ndarray, " B"]]:
    """Prompts as one pack with a text row for each prompt and a vision row for each window, and the
    prompts' lengths.

    Rows are padded at their end: prompt tokens stay at their own positions, new tokens follow.
    """
    lengths = np.array([len(p.tokens) for p in prompts], np.int32)
    windows = [w for p in prompts for w in p.windows.tolist()]
    classes: tuple[tuple[int, int], ...] = ()
    if windows:
        width = _round_up(max(windows), math.lcm(config.vision.merge_unit, 16))
        classes = ((2 ** math.ceil(math.log2(len(windows))), width),)
    pack = PackConfig(len(prompts), _round_up(int(lengths.max()), _TOKEN_STEP), classes)
    vision_rows = itertools.count()
    placements = [
        Placement(i, i, 0, tuple(WindowPlace(0, next(vision_rows), 0) for _ in prompt.windows))
        for i, prompt in enumerate(prompts)
    ]
    batch, _ = build_pack(prompts, placements, pack, config)
    return jax.tree.map(lambda x: x[None], batch), lengths


def choose_tokens(
    logits: Float32[Array, "B V"],
    key: PRNGKeyArray,
    temperature: Float32[Array, ""],
    top_p: Float32[Array, ""],
) -> Int32[Array, " B"]:
    """The likeliest tokens at temperature 0, else a draw from the nucleus."""
    scaled = logits / jnp.maximum(temperature, 1e-6)
    ordered = jnp.sort(scaled, -1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ordered, -1), -1)
    # Smallest logit still in: the first one at which the mass before it reaches top_p is out.
    kept = jnp.sum(mass - jax.nn.softmax(ordered, -1) < top_p, -1)
    smallest = jnp.take_along_axis(ordered, kept[:, None] - 1, -1)
    drawn = jax.random.categorical(key, jnp.where(scaled < smallest, -jnp.inf, scaled))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens", "stop_token"))
def _generate(
    graph: nnx.GraphDef,
    params: Any,
    batch: Batch,
    lengths: Int32[Array, " B"],
    temperature: Float32[Array, ""],
    top_p: Float32[Array, ""],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    stop_token: int,
) -> Int32[Array, "B new"]:
    """The new tokens, `new` = max_new_tokens; after a row's stop token all are stop tokens."""
    model: LlavaOnevision2 = nnx.merge(graph, params)
    hidden, collected = model(batch, collect_cache=True)
    rows = jnp.arange(hidden.shape[0])
    keys = jax.random.split(key, max_new_tokens)
    logits = model.decoder.logits(hidden[rows, lengths - 1])
    token = choose_tokens(logits, keys[0], temperature, top_p)
    room = [(0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0)]
    cache = KVCache(*(jnp.pad(c, room) for c in collected.cache))
    out = jnp.full((len(rows), max_new_tokens), stop_token).at[:, 0].set(token)

    def running(carry: tuple) -> jax.Array:
        i, token, *_ = carry
        return (i < max_new_tokens) & jnp.any(token != stop_token)

    def step(carry: tuple) -> tuple:
        i, token, out, cache = carry
        logits, cache = model.decoder.decode(token, lengths + i - 1, cache)
        new = choose_tokens(logits, keys[i], temperature, top_p)
        new = jnp.where(token == stop_token, stop_token, new)
        return i + 1, new, out.at[:, i].set(new), cache

    return jax.lax.while_loop(running, step, (jnp.int32(1), token, out, cache))[2]


_GREEDY = Sampling()


class Generator:
    """A model ready to answer; parameters may be arrays of any float dtype."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        tokenizer: Tokenizer,
        compute: ComputeConfig | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._params = params
        make = lambda: LlavaOnevision2(config, rngs=nnx.Rngs(0), compute=compute)  # noqa: E731
        self._graph = nnx.split(nnx.eval_shape(make))[0]
        (self._stop,) = token_ids(tokenizer, IM_END)

    def __call__(self, prompts: Sequence[EncodedSample], sampling: Sampling = _GREEDY) -> list[str]:
        """The answers, without the closing <|im_end|>. Raises ConfigError on a bad `sampling`."""
        sampling.check()
        batch, lengths = prompt_batch(prompts, self.config)
        tokens = _generate(
            self._graph,
            self._params,
            batch,
            lengths,
            np.float32(sampling.temperature),
            np.float32(sampling.top_p),
            jax.random.key(sampling.seed),
            max_new_tokens=sampling.max_new_tokens,
            stop_token=self._stop,
        )
        answers = []
        for row in np.asarray(tokens):
            ends = np.flatnonzero(row == self._stop)
            answers.append(self.tokenizer.decode(row[: ends[0]] if len(ends) else row))
        return answers
