"""How a model is computed, as opposed to what it is."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ov2_jax.model.attention import BACKENDS, choose
from ov2_jax.model.config import ConfigError

# Remat policies: what a layer keeps for the backward pass beside its input. The names are those of
# `checkpoint_name` in the encoder's and the decoder's layers; all else is computed again. Gathered
# weights ("weights") are gathered again under every policy. "up" keeps nothing of the encoder: a
# byte kept there, where layers are a fourth as wide, saves a fourth of the FLOPs.
SAVED: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention": ("attention",),
    "up": ("attended", "up"),
    "projections": ("attention", "attended", "qkv", "gate", "up", "vision_attended", "fc1"),
}
# "none" keeps everything, "offload" moves the layers' inputs to the host's memory.
REMAT_POLICIES = ("none", *SAVED, "offload")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """dtype of activations and matmuls, kernels, rematerialisation and block sizes.

    Weights are float32 masters and are cast where they are used; RoPE, norms and softmax are
    computed in float32 whatever `dtype` says.
    """

    dtype: str = "bfloat16"
    # Attention kernels in order of preference; the first that the device runs is taken.
    attention: tuple[str, ...] = tuple(BACKENDS)
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
        unknown = [name for name in self.attention if name not in BACKENDS]
        if unknown or not self.attention:
            raise ConfigError(
                f"compute.attention is {self.attention!r}; it must list some of "
                f"{', '.join(BACKENDS)}."
            )
        if self.loss_block < 1:
            raise ConfigError(f"compute.loss_block must be at least 1, but is {self.loss_block}.")

    @property
    def jax_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def backends(self) -> tuple[str, ...]:
        """`attention`, reduced to the one that this process's devices run (see `for_platform`)."""
        if len(self.attention) == 1:
            return self.attention
        return self.for_platform(jax.default_backend()).attention

    def for_platform(self, platform: str) -> "ComputeConfig":
        """With the one attention kernel that is taken on "tpu", "gpu" or "cpu"."""
        return dataclasses.replace(self, attention=(choose(self.attention, platform),))

    def rematerialised(self, layer: Callable) -> Callable:
        """The function of one layer, with what it keeps for the backward pass."""
        policies = jax.checkpoint_policies
        if self.remat == "none":
            policy = policies.save_anything_except_these_names("weights")
        elif self.remat == "offload":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["layer_input"],
                offload_src="device",
                offload_dst="pinned_host",
            )
        else:
            policy = policies.save_only_these_names(*SAVED[self.remat])
        # Inside a scan nothing can be merged with the forward pass's computation.
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)
