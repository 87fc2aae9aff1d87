"""Rematerialisation: what a layer keeps for the backward pass in addition to its input."""

from collections.abc import Callable

import jax

# The names are those of `checkpoint_name` in the encoder's and the decoder's layers; everything
# else is computed again. Gathered weights ("weights") are gathered again under every policy. "up"
# keeps nothing of the encoder: its layers are a fourth as wide, so a byte kept there saves a fourth
# of the FLOPs.
SAVED: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention": ("attention",),
    "up": ("attended", "up"),
    "projections": ("attention", "attended", "qkv", "gate", "up", "vision_attended", "fc1"),
}


def rematerialised(layer: Callable, remat: str) -> Callable:
    """The function of one layer under a policy of `compute.remat`.

    "none" keeps everything, "offload" moves the layers' inputs to the host's memory, the others
    keep what SAVED names.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        policy = policies.save_anything_except_these_names("weights")
    elif remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(*SAVED[remat])
    # Inside a scan nothing can be merged with the forward pass's computation.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
