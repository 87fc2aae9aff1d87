"""How a model is computed, as opposed to what it is."""

import dataclasses

import jax.numpy as jnp

from ov2_jax.model.config import ConfigError

REMAT_POLICIES = ("none", "full")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """dtype of activations and matmuls, rematerialisation and block sizes.

    Weights are float32 masters and are cast where they are used; RoPE, norms and softmax are
    computed in float32 whatever `dtype` says.
    """

    dtype: str = "bfloat16"
    remat: str = "full"  # "full" keeps only the layers' inputs for the backward pass
    # Rows longer than this attend query block by query block, so that the score matrix never
    # takes more than block x row (an 8B row of 10192 would otherwise need 13 GB of scores).
    attention_block: int = 1024
    # Logits are made for this many tokens of a row at a time: 32768 x 151936 of them in float32
    # would be 20 GB.
    loss_block: int = 1024

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise ConfigError(
                f"compute.dtype is {self.dtype!r}; it must be 'bfloat16' or 'float32'."
            )
        if self.remat not in REMAT_POLICIES:
            raise ConfigError(
                f"compute.remat is {self.remat!r}; it must be one of {', '.join(REMAT_POLICIES)}."
            )
        for name in ("attention_block", "loss_block"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"compute.{name} must be at least 1, but is {getattr(self, name)}."
                )

    @property
    def jax_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)
