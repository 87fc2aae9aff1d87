"""OneVision-Encoder: a native-resolution ViT with (t, h, w) RoPE and windowed attention."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.model import VisionConfig
from ov2_jax.model.attention import Segments, attention, kernel_of, masked_attention, row_segments
from ov2_jax.model.layers.linear import Linear
from ov2_jax.model.layers.norms import NORMS, RMSNorm
from ov2_jax.model.layers.rope import Rope, rotate_neighbours, vision_rope
from ov2_jax.model.layers.stack import scan_layers, stack

Classes = tuple[Segments, ...]  # of the classes of vision rows


def gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """The exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


class Attention(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs) -> None:
        linear = functools.partial(Linear, std=config.initializer_range, rngs=rngs)
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = linear(width, 3 * width, bias=True)
        self.proj = linear(width, width, bias=True)

    def __call__(
        self, x: Float[Array, "P D"], rope: Rope, classes: Classes, kernel: str
    ) -> Float[Array, "P D"]:
        n, d = x.shape
        qkv = self.qkv(x).reshape(n, 3, self.heads, d // self.heads)
        q, k = rotate_neighbours(qkv[:, 0], rope), rotate_neighbours(qkv[:, 1], rope)
        q, k, v = checkpoint_name((q, k, qkv[:, 2]), "qkv")
        out, start = [], 0
        for segments in classes:
            shape = segments.q_ids.shape
            own = slice(start, start := start + math.prod(shape))
            rows = (z[own].reshape(*shape, self.heads, -1) for z in (q, k, v))
            out.append(attention(*rows, segments, kernel=kernel).reshape(-1, d))
        return self.proj(jnp.concatenate(out))


class MLP(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs) -> None:
        linear = functools.partial(Linear, std=config.initializer_range, rngs=rngs)
        self.fc1 = linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, bias=True)

    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        return self.fc2(gelu(checkpoint_name(self.fc1(x), "fc1")))


class EncoderLayer(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs) -> None:
        norm = NORMS[config.layer_norm_type]
        self.layer_norm1 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config, rngs)
        self.layer_norm2 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x: Float[Array, "P D"], rope: Rope, classes: Classes, kernel: str
    ) -> Float[Array, "P D"]:
        x = x + self.attn(self.layer_norm1(x), rope, classes, kernel)
        x = checkpoint_name(x, "vision_attended")
        return x + self.mlp(self.layer_norm2(x))


class PoolingAttention(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs) -> None:
        linear = functools.partial(Linear, std=config.initializer_range, rngs=rngs)
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = linear(width, 3 * width, bias=True)
        self.proj = linear(width, width, bias=True)

    def __call__(
        self, probe: Float[Array, "R 1 D"], x: Float[Array, "R W D"], mask: Bool[Array, "R W"]
    ) -> Float[Array, "R 1 D"]:
        b, p, d = x.shape
        kernel = jnp.split(self.qkv.kernel[...].astype(x.dtype), 3, -1)
        bias = jnp.split(self.qkv.bias[...].astype(x.dtype), 3, -1)
        q, k, v = (
            (z @ w + c).reshape(b, -1, self.heads, d // self.heads)
            for z, w, c in zip((probe, x, x), kernel, bias, strict=True)
        )
        out = masked_attention(q, k, v, mask[:, None, :])  # one query: the probe
        return self.proj(out.reshape(b, 1, d))


class PoolingHead(nnx.Module):
    """Attention pooling with a learned probe, in the standalone encoder."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.probe = nnx.Param(
            config.initializer_range * jax.random.normal(rngs.params(), (1, 1, width))
        )
        self.attn = PoolingAttention(config, rngs)
        self.norm = RMSNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Float[Array, "R W D"], mask: Bool[Array, "R W"]) -> Float[Array, "R D"]:
        """One vector for each row, from the patches under the mask."""
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        a = self.attn(probe, x, mask)
        return (a + self.mlp(self.norm(a)))[:, 0]


class VisionEncoder(nnx.Module):
    """The encoder alone: patches and their positions in, patch features out.

    Rows of a class have one length. Only attention works on rows; everything else takes the patches
    of all classes as one list, so that a layer is gathered, compiled and run once for any classes.

    In a standalone encoder a sample is one row and one window, with patches in raster order. In the
    full model a row holds several windows, with patches in m x m blocks. The encoder treats both
    the same.
    """

    def __init__(
        self, config: VisionConfig, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None
    ) -> None:
        linear = functools.partial(Linear, std=config.initializer_range, rngs=rngs)
        norm = NORMS[config.layer_norm_type]
        self.config = config
        self.compute = compute or ComputeConfig()
        self.patch_embedding = linear(config.patch_dim, config.hidden_size, bias=False)
        self.layernorm_pre = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = stack(lambda r: EncoderLayer(config, r), config.num_hidden_layers, rngs)
        self.layernorm_post = (
            norm(config.hidden_size, eps=config.layer_norm_eps) if config.use_head else None
        )
        self.head = PoolingHead(config, rngs) if config.use_head else None

    def __call__(
        self,
        patches: Float[Array, "P values"],
        patch_positions: Int[Array, "P 3"],
        segment_ids: Sequence[Int[Array, "_R _W"]],
        *,
        collect_layers: bool = False,
    ) -> tuple[Float[Array, "P D"], Float[Array, "N P D"] | None]:
        """Features of all patches.

        Args:
          patches: normalised, the rows of the first class one after the other, then the next class.
          patch_positions: (t, h, w) of each patch.
          segment_ids: the windows of each class's rows, 0 for padding; R and W differ by class.
          collect_layers: return the output of every layer as well.

        Returns:
          The features, after the post-norm if there is one, and the layers' outputs or None.
        """
        rope = vision_rope(
            patch_positions, head_dim=self.config.head_dim, theta=self.config.rope_theta
        )
        classes = tuple(row_segments(ids, causal=False) for ids in segment_ids)
        x = self.layernorm_pre(self.patch_embedding(patches.astype(jnp.dtype(self.compute.dtype))))

        def step(
            layer: EncoderLayer, x: Float[Array, "P D"], _: None
        ) -> tuple[Float[Array, "P D"], Float[Array, "P D"] | None]:
            x = layer(x, rope, classes, kernel_of(self.compute))
            return x, (x if collect_layers else None)

        x, layers = scan_layers(self.layers, step, x, compute=self.compute)
        return (x if self.layernorm_post is None else self.layernorm_post(x)), layers

    def pool(
        self, features: Float[Array, "R W D"], segment_ids: Int[Array, "R W"]
    ) -> Float[Array, "R D"]:
        """The pooling head over the patches of segments > 0; raises ValueError if there is none."""
        if self.head is None:
            raise ValueError("This encoder has no pooling head: its config has use_head false.")
        return self.head(features, segment_ids > 0)
