"""How a model is computed: precision, kernels, memory. model.py has what it is."""

import dataclasses

from ov2_jax.core.errors import ConfigError

# Attention kernels in order of preference (model/attention has them).
ATTENTION_KERNELS = ("splash", "triton", "xla")
# What a layer keeps for the backward pass (model/layers/remat.py).
REMAT_POLICIES = ("none", "full", "attention", "up", "projections", "offload")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """dtype of activations and matmuls, kernels, rematerialisation and block sizes.

    Weights are float32 masters, cast to `dtype` where they are used. RoPE, norms and softmax are
    always computed in float32.
    """

    dtype: str = "bfloat16"
    # Attention kernels in order of preference; the first that runs on the device is used.
    attention: tuple[str, ...] = ATTENTION_KERNELS
    remat: str = "full"
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
        unknown = [name for name in self.attention if name not in ATTENTION_KERNELS]
        if unknown or not self.attention:
            raise ConfigError(
                f"compute.attention is {self.attention!r}; it must list some of "
                f"{', '.join(ATTENTION_KERNELS)}."
            )
        if self.loss_block < 1:
            raise ConfigError(f"compute.loss_block is {self.loss_block}; it must be at least 1.")
