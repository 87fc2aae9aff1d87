"""Eight fake CPU devices for every test, set before JAX starts.

Tests compile a lot and compute little, so LLVM's expensive passes would be most of their time.
"""

import os
from pathlib import Path

import jaxtyping
import pytest

from tests import typechecking

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true"
    " --xla_backend_optimization_level=0"
)


# Every call of these packages' functions is checked against its annotations, shapes included.
jaxtyping.install_import_hook(["ov2_jax", "conversion"], f"{typechecking.__name__}.check")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory) -> None:
    """Many tests compile the same step; the programs that they start are not told of this cache."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """train.jsonl of a small quickstart data set; heldout.jsonl lies beside it."""
    from ov2_jax.quickstart.dataset import write_dataset

    folder = tmp_path_factory.mktemp("quickstart") / "data"
    return write_dataset(folder, train=120, heldout=7, workers=1).train_jsonl


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data) -> Path:
    """The work directory of a run of two steps."""
    from tests.tiny import run

    workdir = tmp_path_factory.mktemp("run") / "finished"
    run(workdir, data, steps=2)
    return workdir
