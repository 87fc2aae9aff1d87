"""The environment of a process that compiles for TPUs on a machine that has none."""

import importlib.metadata
import importlib.util
from collections.abc import Mapping, MutableMapping

from launch import environment
from launch.accelerators import LaunchError, Tpu

INSTALL = "pip install 'ov2_jax[plan]'"


def libtpu_version() -> str:
    """Raises LaunchError where there is no libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise LaunchError(
            f"libtpu, the TPU's compiler, is not installed; {INSTALL} brings the version that "
            "matches jax (no TPU is needed)."
        )
    return importlib.metadata.version("libtpu")


def for_compiling(tpu: Tpu, base: Mapping[str, str]) -> dict[str, str]:
    """What such a process gets. It must be set before JAX is imported."""
    found = {name: value for name, value in base.items() if name != "XLA_FLAGS"}
    return found | {
        # With libtpu installed JAX would look for a TPU first, and wait.
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # no Google Cloud machine: its metadata server does not answer
        # libtpu lets one process of a machine in, as a TPU has room for one; here is no TPU.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # What a run on this platform would compile with.
        "LIBTPU_INIT_ARGS": environment.defaults(tpu)["LIBTPU_INIT_ARGS"],
        # Every plan is of a program that was compiled for it.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def only_cpu(environ: MutableMapping[str, str]) -> None:
    """This process reads configs and shows results; only those that it starts compile."""
    environ["JAX_PLATFORMS"] = "cpu"
    environ["TPU_SKIP_MDS_QUERY"] = "1"
