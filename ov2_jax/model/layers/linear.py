"""The linear map.

Parameters are float32; a module computes in the dtype of its input.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Module):
    """x @ kernel + bias. The kernel is [I O], the bias [O]."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, std: float, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros(n_out)) if bias else None

    def __call__(self, x: Float[Array, "*any I"]) -> Float[Array, "*any O"]:
        # As a product of two matrices: on a CPU the gradients of one with more axes are copied.
        y = (x.reshape(-1, x.shape[-1]) @ self.kernel[...].astype(x.dtype)).reshape(
            *x.shape[:-1], -1
        )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
