"""Eight fake CPU devices for every test, set before JAX starts.

Tests compile a lot and compute little, so LLVM's expensive passes would be most of their time.
"""

import os
import tempfile
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
PACKAGES = ["ov2_jax", "conversion", "launch"]
jaxtyping.install_import_hook(PACKAGES, f"{typechecking.__name__}.check")


def pytest_configure(config: pytest.Config) -> None:
    """One compilation cache for all workers and the programs that tests start.

    Only the process that the user started comes here before JAX has read its environment.
    """
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="ov2-compiled-")
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


# The files that take longest come first, so that no worker ends with one of them alone.
SLOW_FILES = (
    "training/test_run.py",
    "sharding/test_sharding.py",
    "model/test_parity.py",
    "training/test_step.py",
    "model/attention/test_xla.py",
    "model/test_moe.py",
    "launch/test_local.py",
    "generation/test_generation.py",
    "launch/planner/test_plan.py",
    "data/prepare/test_prepare.py",
    "data/inspect/test_inspect.py",
    "data/loader/test_planned.py",
    "benchmarks/test_codec_vs_uniform.py",
    "model/attention/test_triton.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(SLOW_FILES)}
    here = Path(__file__).parent
    items.sort(key=lambda item: order.get(str(item.path.relative_to(here)), len(order)))


@pytest.fixture(scope="session", autouse=True)
def named_tuples_are_checked() -> None:
    for package in PACKAGES:
        typechecking.check_named_tuples(package)


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
