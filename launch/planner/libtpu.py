"""libtpu, the TPU's compiler: its version, and the environment of a process that compiles with it.

The machine needs no TPU.
"""

import importlib.metadata
import importlib.util
from collections.abc import Mapping, MutableMapping

from launch import environment
from launch.accelerators import Tpu
from launch.errors import LaunchError

INSTALL = "pip install 'ov2_jax[plan]'"


def installed_version() -> str:
    """Raises LaunchError if libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise LaunchError(
            f"libtpu, the TPU's compiler, is not installed; {INSTALL} installs the version that "
            "matches jax (no TPU is needed)."
        )
    return importlib.metadata.version("libtpu")


def compile_environment(tpu: Tpu, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that compiles; it must be set before JAX is imported."""
    found = {name: value for name, value in base.items() if name != "XLA_FLAGS"}
    return found | {
        # With libtpu installed JAX would look for a TPU first, and wait.
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # this is no Google Cloud machine: no metadata server answers
        # libtpu lets only one process of a machine load it, as a TPU has room for one. There is
        # no TPU here.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # The flags of a run on this platform.
        "LIBTPU_INIT_ARGS": environment.defaults(tpu)["LIBTPU_INIT_ARGS"],
        # A plan describes a program that was compiled for it, never a cached one.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def use_cpu_only(environ: MutableMapping[str, str]) -> None:
    """For the planner's own process, which reads configs and shows results but compiles nothing."""
    environ["JAX_PLATFORMS"] = "cpu"
    environ["TPU_SKIP_MDS_QUERY"] = "1"
