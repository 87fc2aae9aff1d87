"""Environment variables of a run by platform, and why each is set. A job can change any of them.

None of these was tuned on the hardware by us; they are what its makers advise for large models.
"""

from launch.accelerators import Gpu, Tpu

# Collectives that a layer needs run beside the matmuls of the one before. libtpu reads its flags
# from LIBTPU_INIT_ARGS, and ends the process on one that it does not know (0.0.42 knows these).
_TPU_FLAGS = (
    # Weights that FSDP gathers travel while the TensorCore computes; several fused into one stream.
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
)
# v6e has 128 MiB of VMEM, of which XLA's default leaves most unused; larger tiles read HBM less.
# With 96 MiB instead of 64 compiling takes a quarter longer, and the planner's bound by HBM is 2 %
# higher for the 8B step, 6 % lower for the 4B step.
_V6E_FLAGS = ("--xla_tpu_scoped_vmem_limit_kib=65536",)

_GPU_FLAGS = (
    # Gathers and reductions start early and finish late, so that matmuls hide them.
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    # A lost peer ends the process, and the scheduler restarts all; otherwise NCCL waits for ever.
    "--xla_gpu_nccl_terminate_on_error=true",
)


def defaults(accelerator: Tpu | Gpu) -> dict[str, str]:
    """The variables for a platform."""
    if isinstance(accelerator, Tpu):
        flags = _TPU_FLAGS + (_V6E_FLAGS if accelerator.version == "v6e" else ())
        return {
            "JAX_PLATFORMS": "tpu,cpu",  # no TPU is an error, not a run on the host
            "LIBTPU_INIT_ARGS": " ".join(flags),
            "TPU_STDERR_LOG_LEVEL": "2",  # errors; the runtime tells its whole life below
        }
    return {
        "JAX_PLATFORMS": "cuda,cpu",
        "XLA_FLAGS": " ".join(_GPU_FLAGS),
        # The rest is for NCCL's buffers and cuDNN; JAX's default of 0.75 gives away 14 GiB of 80.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "NCCL_DEBUG": "WARN",  # says which link failed; silent otherwise
    }
