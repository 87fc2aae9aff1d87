"""A prepared folder's tables: mapped, sent to workers as a path, in the digest, and old folders."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from ov2_jax.core.errors import DataError
from ov2_jax.data.packing.planning import Lengths, Packs
from ov2_jax.data.plan import folder as folder_lib
from ov2_jax.data.plan.folder import DONE, PLAN, TABLE, PackPlan, digest_of, read_table, write_table
from ov2_jax.data.plan.lengths import RecordLengths
from tests.data.files import chat, write_jsonl
from tests.data.loader.test_loader import write_data
from tests.data.prepare.folders import content, prepared

TABLES = {f"table/{name}.npy" for name in RecordLengths._fields}
TABLES |= {f"plan/{name}.npy" for name in Packs._fields}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    data = write_data(tmp_path_factory.mktemp("data"), n=15)
    prepared(data, data.parent / "plan")
    return data.parent / "plan"


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_tables_are_npy_files_of_one_column_each(folder):
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.npy")}
    assert found == TABLES
    lengths = read_table(folder / TABLE, RecordLengths)
    assert all(isinstance(array, np.memmap) for array in lengths)
    assert {array.dtype.name for array in lengths} == {"int32", "int64"}
    records = json.loads((folder / "report.json").read_text())["records"]
    assert len(lengths.tokens) == len(lengths.ends) == len(lengths.dropped_rounds) == records
    assert len(lengths.windows) == lengths.ends[-1]


def test_tables_without_a_value_come_back(tmp_path):
    """An empty part of a file cannot be mapped, but a file with its header can."""
    table = Lengths(np.ones(2, np.int32), np.zeros(0, np.int32), np.zeros(2, np.int64))
    write_table(tmp_path / "t", table)
    for array, expected in zip(read_table(tmp_path / "t", Lengths), table, strict=True):
        np.testing.assert_array_equal(array, expected, strict=True)


def test_remote_tables_are_read_into_memory(folder, monkeypatch):
    mapped = read_table(folder / TABLE, RecordLengths)
    monkeypatch.setattr(folder_lib, "is_remote", lambda path: True)
    for array, expected in zip(read_table(folder / TABLE, RecordLengths), mapped, strict=True):
        assert not isinstance(array, np.memmap)
        np.testing.assert_array_equal(array, expected, strict=True)


def test_a_plan_goes_to_workers_without_its_tables(tmp_path):
    samples = [{"messages": chat(f"Say {i}.", f"{i}")} for i in range(500)]
    path = write_jsonl(tmp_path / "many.jsonl", samples)
    prepared(path, tmp_path / "plan", shard_size=512)
    plan = PackPlan(tmp_path / "plan")
    members = plan.members(1).tolist()
    sent = pickle.dumps(plan)
    assert len(sent) < 1500 < plan._tables[0].tokens.nbytes  # the tables are open
    other = pickle.loads(sent)
    assert other.members(1).tolist() == members
    assert other.size(members[0]) == plan.size(members[0]) and other.info == plan.info


def test_the_digest_is_of_every_table(copy):
    files = [copy / name for name in sorted(TABLES)]
    digests = set()
    for file in files:
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        digests.add(digest_of(*files))
        file.write_bytes(before)
    assert len(digests) == len(files) and digest_of(*files) not in digests
    in_order = [copy / TABLE / f"{name}.npy" for name in RecordLengths._fields]
    in_order += [copy / PLAN / f"{name}.npy" for name in Packs._fields]
    assert PackPlan(copy).info.digest == digest_of(*in_order)


@pytest.mark.parametrize("missing", ["table/tokens.npy", "table/ends.npy", "plan/members.npy"])
def test_a_plan_without_a_table_is_one_sentence(copy, missing):
    (copy / missing).unlink()
    with pytest.raises(DataError, match=f"{copy} has no {missing}, .* another --out") as error:
        PackPlan(copy)
    assert "\n" not in str(error.value)


def test_a_folder_of_the_earlier_version_is_refused_by_prepare_as_well(folder, copy):
    """Its tables and shards were safetensors files."""
    for path in [*(copy / "lengths").iterdir()]:
        path.rename(path.with_suffix(".safetensors"))
    for name in (TABLE, PLAN):
        shutil.rmtree(copy / name)
    before = content(copy)
    with pytest.raises(DataError, match=f"{copy} has no table/tokens.npy, .* another --out"):
        prepared(folder.parent / "train.jsonl", copy)
    assert content(copy) == before


def test_tables_of_a_plan_that_was_not_finished_are_made_again(folder, copy):
    """As after a kill between two tables, of which one is still the earlier plan's."""
    (copy / DONE).unlink()
    (copy / "plan/ends.npy").unlink()
    np.save(copy / "plan/members.npy", np.arange(3))
    (copy / "table/.ends.npy.0123.part").write_bytes(b"half")
    with pytest.raises(DataError, match="where prepare has not finished"):
        PackPlan(copy)
    prepared(folder.parent / "train.jsonl", copy)
    assert content(copy) == content(folder)
