"""Environment variables of a run by platform, and why each is set. A job can change any of them.

We tuned none of these on the hardware; its makers advise them for large models.
"""

from launch.accelerators import Gpu, Tpu

# A layer's collectives overlap with the matmuls of the layer before it. libtpu reads its flags from
# LIBTPU_INIT_ARGS and ends the process on an unknown one (0.0.42 has these).
_TPU_FLAGS = (
    # FSDP's all-gathers of weights run while the TensorCore computes; several fuse into one stream.
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
)
# v6e has 128 MiB of VMEM, and XLA's default leaves most of it unused; larger tiles read HBM less.
# With 96 MiB instead of 64 a compile takes a quarter longer, and the planner's bound by HBM is 2 %
# higher for the 8B step and 6 % lower for the 4B step.
_V6E_FLAGS = ("--xla_tpu_scoped_vmem_limit_kib=65536",)

_GPU_FLAGS = (
    # Collectives start early and finish late, so that matmuls hide them.
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    # A lost peer ends the process, and the scheduler restarts all; otherwise NCCL waits forever.
    "--xla_gpu_nccl_terminate_on_error=true",
)


def defaults(accelerator: Tpu | Gpu) -> dict[str, str]:
    """The variables of a run on this accelerator."""
    if isinstance(accelerator, Tpu):
        flags = _TPU_FLAGS + (_V6E_FLAGS if accelerator.version == "v6e" else ())
        return {
            "JAX_PLATFORMS": "tpu,cpu",  # without a TPU it is an error, not a run on the host
            "LIBTPU_INIT_ARGS": " ".join(flags),
            "TPU_STDERR_LOG_LEVEL": "2",  # errors only; lower levels log every step of the start
        }
    return {
        "JAX_PLATFORMS": "cuda,cpu",
        "XLA_FLAGS": " ".join(_GPU_FLAGS),
        # The rest is for NCCL's buffers and cuDNN; JAX's default of 0.75 wastes 14 GiB of 80.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "NCCL_DEBUG": "WARN",  # names the link that failed; silent otherwise
    }
