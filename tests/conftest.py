"""Eight fake CPU devices for every test, set before JAX starts.

Tests compile a lot and compute little, so LLVM's expensive passes would be most of their time.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true"
    " --xla_backend_optimization_level=0"
)
