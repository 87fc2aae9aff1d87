"""The merger (adapter): m x m neighbouring patches become one token of the text's width."""

import functools

from flax import nnx
from jaxtyping import Array, Float

from ov2_jax.config.model import VisionConfig
from ov2_jax.model.encoder import gelu
from ov2_jax.model.layers.linear import Linear
from ov2_jax.model.layers.norms import LayerNorm


class Merger(nnx.Module):
    """LayerNorm of each patch (also if the encoder has RMSNorm), concatenation, an MLP."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        linear = functools.partial(Linear, std=config.initializer_range, rngs=rngs)
        self.block = config.hidden_size * config.merge_unit
        self.ln_q = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = linear(self.block, self.block, bias=True)
        self.fc2 = linear(self.block, config.out_hidden_size, bias=True)

    def __call__(self, x: Float[Array, "P D"]) -> Float[Array, "M O"]:
        """Every m*m consecutive patches become a token of the decoder's width: M = P / m^2."""
        x = self.ln_q(x).reshape(-1, self.block)
        return self.fc2(gelu(self.fc1(x)))
