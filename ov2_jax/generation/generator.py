"""Batched generation with a key/value cache: prompts in, texts out.

Dimension letters: N prompts, L prompt tokens, S cache slots (L and the new tokens), V vocabulary,
R vision rows of W patches (one window each).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.core.batch import IGNORE, Batch, VisionRows
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.encoding.tokenizer import IM_END, Tokenizer, token_ids
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


def prompt_batch(prompts: Sequence[EncodedSample], config: ModelConfig) -> tuple[Batch, np.ndarray]:
    """Prompts as one pack, one text row a prompt and one vision row a window, and lengths [N].

    Rows are padded at their end: prompt tokens sit at their own positions, new ones follow.
    """
    n = len(prompts)
    length = _round_up(max(len(p.tokens) for p in prompts), _TOKEN_STEP)
    sizes = [int(w) for p in prompts for w in p.windows]
    unit = config.vision.merge_unit
    width = _round_up(max(sizes, default=0), math.lcm(unit, 16))
    rows = 2 ** math.ceil(math.log2(len(sizes))) if sizes else 0
    batch = Batch(*(np.zeros((1, n, length), np.int32) for _ in range(5)), ())
    batch.targets[:] = IGNORE
    batch.vision_index[:] = -1
    vision = VisionRows(
        np.zeros((1, rows, width, config.vision.patch_dim), np.uint8),
        np.zeros((1, rows, width, 3), np.int32),
        np.zeros((1, rows, width), np.int32),
    )
    row = 0
    for i, prompt in enumerate(prompts):
        k = len(prompt.tokens)
        batch.tokens[0, i, :k] = prompt.tokens
        batch.positions[0, i, :k] = np.arange(k)
        batch.segment_ids[0, i, :k] = 1
        index, start = [], 0
        for size in map(int, prompt.windows):
            vision.patches[0, row, :size] = prompt.patches[start : start + size]
            vision.patch_positions[0, row, :size] = prompt.patch_positions[start : start + size]
            vision.segment_ids[0, row, :size] = 1
            index.extend(range(row * width // unit, (row * width + size) // unit))
            start, row = start + size, row + 1
        pads = np.flatnonzero(prompt.tokens == config.image_token_id)
        if len(pads) != len(index):
            raise ValueError(
                f"Prompt {i} has {len(pads)} image placeholders for {len(index)} merged tokens."
            )
        batch.vision_index[0, i, pads] = index
    lengths = np.array([len(p.tokens) for p in prompts], np.int32)
    return batch._replace(vision=(vision,) if sizes else ()), lengths


def choose_tokens(
    logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Logits [N V] -> tokens [N]: the largest at temperature 0, else a draw from the nucleus."""
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
    lengths: jax.Array,  # [N]
    temperature: jax.Array,
    top_p: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    stop_token: int,
) -> jax.Array:
    """New tokens [N max_new_tokens]; behind a row's stop token everything is stop tokens."""
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
