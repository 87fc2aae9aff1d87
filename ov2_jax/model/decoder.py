"""The Qwen3 decoder: RMSNorm, grouped-query attention with normed q and k, SwiGLU or experts.

Dimension letters: B rows, L tokens, D width, H query heads, J key/value heads, K head size,
N layers, S slots of the key/value cache.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.model import TextConfig
from ov2_jax.model.attention import Segments, attention, kernel_of, masked_attention
from ov2_jax.model.layers.basic import Linear, RMSNorm, scan_layers, stack
from ov2_jax.model.layers.rope import Rope, rotate_half, text_rope
from ov2_jax.model.moe.mixture import MixtureOfExperts, RouterLoad
from ov2_jax.sharding.exchange import (
    axis_index,
    axis_size,
    gather_row,
    gather_tokens,
    row_index,
    scatter_tokens,
)


class KVCache(NamedTuple):
    """Keys and values of all layers, [N B S J K]."""

    keys: jax.Array
    values: jax.Array


class Collected(NamedTuple):
    """What a pass over rows gives beside the hidden states; None where there is nothing."""

    cache: KVCache | None  # if asked for
    load: RouterLoad | None  # of every layer [N ...], where the decoder is a mixture of experts


class Row(NamedTuple):
    """What every layer needs to know of packed rows, made once for all of them."""

    rope: Rope  # of the tokens of a tensor group, L'
    segments: Segments  # their queries against the keys of the whole row
    real: jax.Array  # bool [B L]: this device's tokens that are not padding


@jax.custom_vjp
def _rows_of(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table [V D]. The gradient adds up in float32: a frequent token has thousands."""
    return table[index]


def _rows_of_forward(table: jax.Array, index: jax.Array) -> tuple:
    return table[index], (index, jnp.zeros((0, len(table)), table.dtype))


def _rows_of_backward(saved: tuple, gradient: jax.Array) -> tuple[jax.Array, None]:
    index, like = saved
    zero = jnp.zeros((like.shape[1], gradient.shape[-1]), jnp.float32)
    return zero.at[index].add(gradient.astype(jnp.float32)).astype(like.dtype), None


_rows_of.defvjp(_rows_of_forward, _rows_of_backward)


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, width: int, *, std: float, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (vocab_size, width)))

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """int [B L] -> [B L D]. Under tensor parallelism the table holds a part of the words."""
        table = self.embedding[...].astype(dtype)
        if axis_size("tensor") == 1:
            return _rows_of(table, tokens)
        here = gather_tokens(tokens) - axis_index("tensor") * len(table)
        mine = (here >= 0) & (here < len(table))
        x = jnp.where(mine[..., None], _rows_of(table, jnp.where(mine, here, 0)), 0)
        return scatter_tokens(x)


class Attention(nnx.Module):
    def __init__(self, config: TextConfig, rngs: nnx.Rngs) -> None:
        linear = functools.partial(Linear, std=config.initializer_range, rngs=rngs)
        width, size = config.hidden_size, config.head_dim
        self.head_dim = size
        n_q, n_kv = config.num_attention_heads * size, config.num_key_value_heads * size
        self.q_proj = linear(width, n_q, bias=False)
        self.k_proj = linear(width, n_kv, bias=False)
        self.v_proj = linear(width, n_kv, bias=False)
        self.o_proj = linear(n_q, width, bias=False)
        self.q_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(size, eps=config.rms_norm_eps)

    def qkv(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B L D] -> q [B L H K], k and v [B L J K]."""
        q, k, v = (
            proj(x).reshape(*x.shape[:2], -1, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate_half(self.q_norm(q), rope), rotate_half(self.k_norm(k), rope), v

    def out(self, x: jax.Array) -> jax.Array:
        """[B L H K] -> [B L D]."""
        return self.o_proj(x.reshape(*x.shape[:2], -1))


class SwiGLU(nnx.Module):
    """Under tensor parallelism a device has a part of the hidden units, for its group's tokens."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs) -> None:
        linear = functools.partial(Linear, std=config.initializer_range, rngs=rngs)
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(width, hidden, bias=False)
        self.up_proj = linear(width, hidden, bias=False)
        self.down_proj = linear(hidden, width, bias=False)

    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, None]:
        """[B L D] -> [B L D]; as in MixtureOfExperts, but there is no load to tell of."""
        del real
        x = gather_tokens(x)
        gate = checkpoint_name(self.gate_proj(x), "gate")
        up = checkpoint_name(self.up_proj(x), "up")
        return scatter_tokens(self.down_proj(jax.nn.silu(gate) * up)), None


class DecoderLayer(nnx.Module):
    def __init__(self, config: TextConfig, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = (MixtureOfExperts if config.num_experts else SwiGLU)(config, rngs)

    def feed_forward(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, RouterLoad | None]:
        """x [B L D], real [B L]: not padding."""
        y, load = self.mlp(self.post_attention_layernorm(x), real)
        return x + y, load

    def __call__(
        self, x: jax.Array, row: Row, kernel: str
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array], RouterLoad | None]:
        """Packed rows: [B L D] -> [B L D], this layer's keys and values, its router's load.

        A device's heads attend from the tokens of its tensor group to the keys of the whole row.
        """
        q, k, v = self.attn.qkv(gather_tokens(self.input_layernorm(x)), row.rope)
        q, k, v = checkpoint_name((q, k, v), "qkv")
        out = attention(q, gather_row(k), gather_row(v), row.segments, kernel=kernel)
        x = checkpoint_name(x + scatter_tokens(self.attn.out(out)), "attended")
        x, load = self.feed_forward(x, row.real)
        return x, (k, v), load

    def step(
        self, x: jax.Array, rope: Rope, cache: tuple[jax.Array, jax.Array], slots: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """One more token a row: x [B 1 D] goes to slot `slots` [B] of this layer's [B S J K]."""
        q, k, v = self.attn.qkv(self.input_layernorm(x), rope)
        rows = jnp.arange(x.shape[0])
        keys = cache[0].at[rows, slots].set(k[:, 0])
        values = cache[1].at[rows, slots].set(v[:, 0])
        seen = jnp.arange(keys.shape[1])[None, :] <= slots[:, None]  # B S
        x = x + self.attn.out(masked_attention(q, keys, values, seen[:, None, :]))
        x, _ = self.feed_forward(x, jnp.ones(x.shape[:2], bool))
        return x, (keys, values)


class Decoder(nnx.Module):
    """Embeds tokens, runs the layers, and owns the head (or shares the embedding with it)."""

    def __init__(
        self,
        config: TextConfig,
        *,
        tie_word_embeddings: bool,
        rngs: nnx.Rngs,
        compute: ComputeConfig | None = None,
    ) -> None:
        linear = functools.partial(Linear, std=config.initializer_range, rngs=rngs)
        self.config = config
        self.compute = compute or ComputeConfig()
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, std=config.initializer_range, rngs=rngs
        )
        self.layers = stack(lambda r: DecoderLayer(config, r), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = (
            None
            if tie_word_embeddings
            else linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int [...] -> [... D]."""
        return self.embed_tokens(tokens, jnp.dtype(self.compute.dtype))

    def head(self) -> jax.Array:
        """The output kernel, [D V]."""
        if self.lm_head is None:
            return self.embed_tokens.embedding[...].T
        return self.lm_head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[... D] -> float32 [... V]."""
        kernel = self.head().astype(hidden.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    def _rope(self, positions: jax.Array) -> Rope:
        return text_rope(positions, head_dim=self.config.head_dim, theta=self.config.rope_theta)

    def __call__(
        self,
        embeddings: jax.Array,  # [B L D]
        positions: jax.Array,  # int [B L]
        segment_ids: jax.Array,  # int [B L]
        *,
        collect_cache: bool = False,
    ) -> tuple[jax.Array, Collected]:
        """Hidden states [B L D] behind the final norm, and what was collected on the way."""
        ids = gather_tokens(segment_ids)
        row = Row(
            rope=self._rope(gather_tokens(positions)),
            segments=Segments(ids, gather_row(ids), row_index(ids.shape[1])),
            real=segment_ids > 0,
        )

        def step(layer: DecoderLayer, x: jax.Array, _: None) -> tuple:
            x, kv, load = layer(x, row, kernel_of(self.compute))
            return x, Collected(KVCache(*kv) if collect_cache else None, load)

        x, collected = scan_layers(self.layers, step, embeddings, compute=self.compute)
        return self.norm(x), collected

    def decode(
        self, tokens: jax.Array, slots: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """One step of generation: tokens [B] at positions `slots` [B] -> logits [B V], cache."""
        rope = self._rope(slots[:, None])

        def step(layer: DecoderLayer, x: jax.Array, kv: tuple) -> tuple:
            return layer.step(x, rope, kv, slots)

        x, kv = scan_layers(
            self.layers, step, self.embed(tokens[:, None]), tuple(cache), compute=self.compute
        )
        return self.logits(self.norm(x))[:, 0], KVCache(*kv)
