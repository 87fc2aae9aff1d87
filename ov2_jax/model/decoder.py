"""The Qwen3 decoder: RMSNorm, grouped-query attention with normed q and k, SwiGLU or experts.

On a mesh, L is a device's own tokens of a row, Q those of its tensor group, T the whole row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.model import TextConfig
from ov2_jax.model.attention import Segments, attention, kernel_of, masked_attention
from ov2_jax.model.layers.linear import Linear
from ov2_jax.model.layers.norms import RMSNorm
from ov2_jax.model.layers.rope import Rope, rotate_half, text_rope
from ov2_jax.model.layers.stack import scan_layers, stack
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
    """Keys and values of all layers, or of one without the N axis."""

    keys: Float[Array, "*N B S J K"]
    values: Float[Array, "*N B S J K"]


class Collected(NamedTuple):
    """What a pass over rows gives in addition to the hidden states."""

    cache: KVCache | None  # None unless `collect_cache` asks for it
    load: RouterLoad | None  # of every layer; None if the decoder is dense


class Row(NamedTuple):
    """What every layer needs of packed rows, made once for all layers."""

    rope: Rope  # of the tokens of a tensor group: [B Q K]
    segments: Segments  # of their queries and of the keys of the whole row
    real: Bool[Array, "B L"]  # this device's tokens that are not padding


@jax.custom_vjp
def _rows_of(table: Float[Array, "V D"], index: Int[Array, "*any"]) -> Float[Array, "*any D"]:
    """Rows of a table. The gradient adds up in float32: a frequent token has thousands."""
    return table[index]


def _rows_of_forward(
    table: Float[Array, "V D"], index: Int[Array, "*any"]
) -> tuple[Float[Array, "*any D"], tuple]:
    return table[index], (index, jnp.zeros((0, len(table)), table.dtype))


def _rows_of_backward(
    saved: tuple, gradient: Float[Array, "*any D"]
) -> tuple[Float[Array, "V D"], None]:
    index, like = saved
    zero = jnp.zeros((like.shape[1], gradient.shape[-1]), jnp.float32)
    return zero.at[index].add(gradient.astype(jnp.float32)).astype(like.dtype), None


_rows_of.defvjp(_rows_of_forward, _rows_of_backward)


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, width: int, *, std: float, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (vocab_size, width)))

    def __call__(self, tokens: Int[Array, "B L"], dtype: jnp.dtype) -> Float[Array, "B L D"]:
        """Embeddings of tokens. Under tensor parallelism a device has a part of the words."""
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

    def qkv(
        self, x: Float[Array, "B Q D"], rope: Rope
    ) -> tuple[Float[Array, "B Q H K"], Float[Array, "B Q J K"], Float[Array, "B Q J K"]]:
        """Queries, keys and values of the same tokens."""
        q, k, v = (
            proj(x).reshape(*x.shape[:2], -1, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate_half(self.q_norm(q), rope), rotate_half(self.k_norm(k), rope), v

    def out(self, x: Float[Array, "B Q H K"]) -> Float[Array, "B Q D"]:
        """The output projection of all heads."""
        return self.o_proj(x.reshape(*x.shape[:2], -1))


class SwiGLU(nnx.Module):
    """Under tensor parallelism a device has a part of the hidden units, for its group's tokens."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs) -> None:
        linear = functools.partial(Linear, std=config.initializer_range, rngs=rngs)
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(width, hidden, bias=False)
        self.up_proj = linear(width, hidden, bias=False)
        self.down_proj = linear(hidden, width, bias=False)

    def __call__(
        self, x: Float[Array, "B L D"], real: Bool[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], None]:
        """As MixtureOfExperts, but there is no router and so no load."""
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

    def feed_forward(
        self, x: Float[Array, "B L D"], real: Bool[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], RouterLoad | None]:
        """The layer's second half; `real` tokens are not padding."""
        y, load = self.mlp(self.post_attention_layernorm(x), real)
        return x + y, load

    def __call__(
        self, x: Float[Array, "B L D"], row: Row, kernel: str
    ) -> tuple[
        Float[Array, "B L D"],
        tuple[Float[Array, "B Q J K"], Float[Array, "B Q J K"]],
        RouterLoad | None,
    ]:
        """Hidden states of packed rows, this layer's keys and values, and its router's load.

        A device's heads attend from the tokens of its tensor group to the keys of the whole row.
        """
        q, k, v = self.attn.qkv(gather_tokens(self.input_layernorm(x)), row.rope)
        q, k, v = checkpoint_name((q, k, v), "qkv")
        out = attention(q, gather_row(k), gather_row(v), row.segments, kernel=kernel)
        x = checkpoint_name(x + scatter_tokens(self.attn.out(out)), "attended")
        x, load = self.feed_forward(x, row.real)
        return x, (k, v), load

    def step(
        self,
        x: Float[Array, "B 1 D"],
        rope: Rope,
        cache: tuple[Float[Array, "B S J K"], Float[Array, "B S J K"]],
        slots: Int[Array, " B"],
    ) -> tuple[Float[Array, "B 1 D"], tuple[Float[Array, "B S J K"], Float[Array, "B S J K"]]]:
        """One more token for each row; its key and value go into its slot of this layer's cache."""
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

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Embeddings in the compute dtype."""
        return self.embed_tokens(tokens, jnp.dtype(self.compute.dtype))

    def head(self) -> Float[Array, "D V"]:
        """The output kernel."""
        if self.lm_head is None:
            return self.embed_tokens.embedding[...].T
        return self.lm_head.kernel[...]

    def logits(self, hidden: Float[Array, "*any D"]) -> Float32[Array, "*any V"]:
        """Logits over the vocabulary."""
        kernel = self.head().astype(hidden.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    def _rope(self, positions: Int[Array, "B L"]) -> Rope:
        return text_rope(positions, head_dim=self.config.head_dim, theta=self.config.rope_theta)

    def __call__(
        self,
        embeddings: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"],
        *,
        collect_cache: bool = False,
    ) -> tuple[Float[Array, "B L D"], Collected]:
        """Hidden states after the final norm, and what the layers collected."""
        ids = gather_tokens(segment_ids)
        row = Row(
            rope=self._rope(gather_tokens(positions)),
            segments=Segments(ids, gather_row(ids), row_index(ids.shape[1])),
            real=segment_ids > 0,
        )

        def step(
            layer: DecoderLayer, x: Float[Array, "B L D"], _: None
        ) -> tuple[Float[Array, "B L D"], Collected]:
            x, kv, load = layer(x, row, kernel_of(self.compute))
            return x, Collected(KVCache(*kv) if collect_cache else None, load)

        x, collected = scan_layers(self.layers, step, embeddings, compute=self.compute)
        return self.norm(x), collected

    def decode(
        self, tokens: Int[Array, " B"], slots: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float32[Array, "B V"], KVCache]:
        """One step of generation: logits for one more token of each row, at position `slots`."""
        rope = self._rope(slots[:, None])

        def step(
            layer: DecoderLayer,
            x: Float[Array, "B 1 D"],
            kv: tuple[Float[Array, "B S J K"], Float[Array, "B S J K"]],
        ) -> tuple[Float[Array, "B 1 D"], tuple[Float[Array, "B S J K"], Float[Array, "B S J K"]]]:
            return layer.step(x, rope, kv, slots)

        x, kv = scan_layers(
            self.layers, step, self.embed(tokens[:, None]), tuple(cache), compute=self.compute
        )
        return self.logits(self.norm(x))[:, 0], KVCache(*kv)
