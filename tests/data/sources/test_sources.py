"""All formats in one run: the same batches from threads and worker processes, and exact resume."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ov2_jax.config.data import SourceConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.data.loader.loader import make_loader
from tests.data.files import chat, picture, write_jsonl
from tests.tiny import data_config, tiny_model, tokenizer


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Twelve samples with a picture in each format; one of the tar's is broken."""
    root = tmp_path_factory.mktemp("sources")
    png = picture(root / "a.png", 60, 90).read_bytes()

    def sample(kind: str, i: int, image) -> dict:
        return {"id": f"{kind}{i}", "messages": chat("<image>Which?", f"{i}"), "image": image}

    write_jsonl(root / "lines.jsonl", [sample("lines", i, "a.png") for i in range(12)])
    rows = [sample("rows", i, {"bytes": png, "path": None}) for i in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), root / "rows.parquet", row_group_size=5)
    with tarfile.open(root / "members.tar", "w") as tar:
        for i in range(12):
            text = json.dumps(sample("members", i, "a.png")).encode() if i != 4 else b"{"
            for name, data in ((f"{i:03d}.json", text), (f"{i:03d}.png", png)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    writer = ArrayRecordWriter(str(root / "records.array_record"), "group_size:1")
    for i in range(12):
        writer.write(json.dumps(sample("records", i, "a.png")).encode())
    writer.close()
    names = ("lines.jsonl", "rows.parquet", "members.tar", "records.array_record")
    return tuple(SourceConfig(str(root / name), cap=9) for name in names)


def loader(sources, where, workers: int):
    return make_loader(
        data_config(sources=sources, lookahead=6, max_reject_share=0.5, num_workers=workers),
        PackConfig(2, 128, ((4, 64),)),
        tiny_model(),
        tokenizer(),
        packs_per_step=1,
        seed=5,
        rejects_path=where / "rejected.jsonl",
    )


def test_one_run_over_all_formats(sources, tmp_path):
    threads = loader(sources, tmp_path, 0)
    steps = [next(threads) for _ in range(30)]
    threads.close()
    names = {n.rstrip("0123456789") for _, i in steps for ids in i.sample_ids for n in ids}
    assert names == {"lines", "rows", "members", "records"}
    share = {name: count for name, count, _ in steps[-1][1].mixture}
    assert max(share.values()) - min(share.values()) <= 9
    (rejected,) = (tmp_path / "rejected.jsonl").read_text().splitlines()
    rejected = json.loads(rejected)
    assert rejected["reason"] == "bad_json" and rejected["line"] == 5
    assert rejected["file"] == sources[2].path and rejected["id"] == "members:5"

    processes = loader(sources, tmp_path, 1)
    again = [next(processes) for _ in range(3)]
    state = json.loads(json.dumps(processes.get_state()))
    processes.close()
    resumed = loader(sources, tmp_path, 0)
    resumed.set_state(state)
    again += [next(resumed) for _ in range(27)]
    resumed.close()
    for (batch, info), (other, other_info) in zip(steps, again, strict=True):
        assert info == other_info
        np.testing.assert_array_equal(batch.tokens, other.tokens)
        np.testing.assert_array_equal(batch.vision[0].patches, other.vision[0].patches)
