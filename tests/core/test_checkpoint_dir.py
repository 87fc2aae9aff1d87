"""What counts as a checkpoint, and the errors if there is none."""

import numpy as np
import orbax.checkpoint as ocp
import pytest

from ov2_jax.core.checkpoint_dir import is_hf_folder, resolve
from ov2_jax.core.errors import CheckpointError
from tests.golden_cases import GOLDEN

TREE = {"a": np.ones(3, np.float32)}


@pytest.fixture
def work(tmp_path):
    """A work folder with steps 2 and 10."""
    with ocp.CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
        for step in (2, 10):
            manager.save(step, args=ocp.args.Composite(params=ocp.args.PyTreeSave(TREE)))
    (tmp_path / "run" / "hf").mkdir()
    (tmp_path / "run" / "hf" / "config.json").write_text("{}")
    return tmp_path / "run"


def test_a_work_folder_is_its_latest_finished_step(work):
    (work / "checkpoints" / "11.orbax-checkpoint-tmp-0" / "params").mkdir(parents=True)
    (work / "checkpoints" / "12" / "params").mkdir(parents=True)  # copied in part
    found = resolve(work)
    assert found.step == 10
    assert found.params == work / "checkpoints" / "10" / "params"
    assert found.require_hf() == work / "hf"


def test_one_step(work):
    found = resolve(work / "checkpoints" / "2")
    assert (found.step, found.hf) == (2, work / "hf")


def test_a_converted_folder(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", TREE)
    found = resolve(tmp_path)
    assert (found.params, found.hf, found.step) == (tmp_path / "params", tmp_path / "hf", None)
    with pytest.raises(CheckpointError, match="hf has no config.json"):
        found.require_hf()


def test_what_is_no_checkpoint(work, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither params/ nor checkpoints/"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match="convert it with conversion.from_hf"):
        resolve(GOLDEN / "encoder" / "hf")
    (work / "checkpoints" / "10" / "params" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="not a finished Orbax checkpoint"):
        resolve(work / "checkpoints" / "10")
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no finished checkpoint yet"):
        resolve(empty)
    (empty / "checkpoints" / "5.orbax-checkpoint-tmp-1").mkdir()
    with pytest.raises(CheckpointError, match=r"unfinished.*5\.orbax-checkpoint-tmp-1"):
        resolve(empty)


def test_hf_folders(work):
    assert is_hf_folder(GOLDEN / "encoder" / "hf")
    assert not is_hf_folder(work / "hf")
    assert not is_hf_folder(work)
