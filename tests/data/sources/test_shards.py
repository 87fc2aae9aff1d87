"""Tar and ArrayRecord shards: WebDataset, Energon's packed samples, damaged files."""

import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ov2_jax.config.data import SourceConfig
from ov2_jax.core.errors import DataError
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.rejected import Rejected, SampleError
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.parsing import parse_record
from ov2_jax.data.sources.readers.array_record import ArrayRecordReader
from tests.data.files import chat, clip, picture
from tests.tiny import data_config, tiny_model, tokenizer


@pytest.fixture(scope="module")
def jpg(tmp_path_factory):
    return picture(tmp_path_factory.mktemp("jpg") / "a.jpg", 60, 90).read_bytes()


def tar(path, members: dict[str, bytes | dict | list]):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def source_of(path):
    return RecordSource([SourceConfig(str(path))])


def outcomes(source) -> list[str]:
    """Ids of good samples, reasons of bad ones; all of them encoded."""
    encoder = SampleEncoder(data_config(), tiny_model(), tokenizer())
    results = [encoder(source[i]) for i in range(len(source))]
    return [r.reason if isinstance(r, Rejected) else r.id for r in results]


# --- tar ------------------------------------------------------------------------------------------


def test_webdataset_samples_with_members_as_media(tmp_path, jpg):
    film = clip(tmp_path / "a.mp4", 12, 6).read_bytes()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"}]
    members = {
        "a/1.jpg": jpg,
        "a/1.json": {"conversations": turns, "image": "where/it/was.jpg"},
        "a/2.json": chat("<video>?", "A"),
        "a/2.mp4": film,
        "3.0.jpg": jpg,
        "3.1.jpg": jpg,
        "3.json": {"id": "own", "messages": chat("<image><image>?", "A")},
        "4.jpg": jpg,
        "4.txt": "Ein Käfer.".encode(),
        "5.json": {"messages": chat("Q", "A")},
    }
    source = pickle.loads(pickle.dumps(source_of(tar(tmp_path / "s-000.tar", members))))
    assert outcomes(source) == ["a/1", "a/2", "own", "4", "5"]
    records = [parse_record(source[i]) for i in range(5)]
    assert records[0].images[0].data == jpg and str(records[0].images[0]) == "a/1.jpg"
    assert records[1].videos[0].data == film
    assert len(records[2].images) == 2
    assert list(records[3].messages) == chat("<image>", "Ein Käfer.")
    assert [r.line for r in records] == [1, 2, 3, 4, 5]


def test_bad_webdataset_samples(tmp_path, jpg):
    members = {
        "1.json": {"messages": chat("<image>?", "A"), "images": ["a.jpg", "b.jpg"]},
        "1.jpg": jpg,
        "2.json": b"{",
        "3.jpg": jpg,
        "4.json": {"messages": chat("<image>?", "A"), "images": ["../../etc/passwd"]},
        "5.jpg": jpg[:300],
        "5.txt": b"A",
        "6.txt": b"\xff\xfe",
        "7.json": {"messages": chat("Q", "A")},
    }
    assert outcomes(source_of(tar(tmp_path / "a.tar", members))) == [
        *("bad_record", "bad_json", "bad_record", "bad_record", "bad_image", "bad_record"),
        "7",
    ]


def packed(count: int, **fields):
    return {
        "images": [[f"img{i:03d}_sub000.jpg"] * (i % 2) for i in range(count)],
        "prompts": [["<image>One?" if i % 2 else "One?", "Two?"] for i in range(count)],
        "captions": [["1", "2"] for i in range(count)],
        "sample_count": count,
        **fields,
    }


def test_energon_packed_samples_come_out_one_by_one(tmp_path, jpg):
    npy = io.BytesIO()
    np.save(npy, np.array([[9, 0, 0], [9, 0, 1], [9, 1, 0], [9, 1, 1]]))
    old = {"images": ["a.jpg"], "prompts": ["<image>?"], "captions": ["A"]}
    members = {
        "ps_00000000.img1_0.jpg": jpg,
        "ps_00000000.json": packed(3, timestamp_decimal=[1, 2, 1], fps=[None, 2.0, None]),
        "ps_00000001.img1_0.jpg": jpg,
        "ps_00000001.img1_0.npy": npy.getvalue(),
        "ps_00000001.json": packed(2, patch_positions=[[], ["img001_sub000.npy"]]),
        "ps_00000002.img0.jpg": jpg,
        "ps_00000002.json": old,
        "ps_00000003.json": packed(2),
        "ps_00000004.json": {"images": []},
    }
    source = source_of(tar(tmp_path / "pretrain-000000.tar", members))
    assert outcomes(source) == [
        *("ps_00000000/0", "ps_00000000/1", "ps_00000000/2"),
        *("ps_00000001/0", "ps_00000001/1"),
        "ps_00000002/0",
        *("ps_00000003/0", "missing_file"),
        "bad_record",
    ]
    record = parse_record(source[1])
    assert list(record.messages) == chat("<image>One?", "1", "Two?", "2")
    assert record.timestamp_decimal == 2 and record.images[0].data == jpg
    canvases = parse_record(source[4]).videos[0]
    assert canvases.images[0].data == jpg and canvases.positions[0].data == npy.getvalue()


def test_damaged_tars_keep_the_samples_before_the_damage(tmp_path, jpg):
    members = {f"{i}.{s}": jpg if s == "jpg" else b"A" for i in range(4) for s in ("jpg", "txt")}
    data = tar(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        third = archive.getmember("2.jpg")
    cases = {
        "cut": (data[: third.offset_data + 100], ["0", "bad_shard"]),
        "header": (
            data[: third.offset] + b"\xff" * 512 + data[third.offset + 512 :],
            ["0", "bad_shard"],
        ),
        "member": (
            data[: third.offset_data] + bytes(third.size) + data[third.offset_data + third.size :],
            ["0", "1", "bad_image", "3"],
        ),
        "no_end": (data[: third.offset], ["0", "bad_shard"]),
        "empty": (b"", ["bad_shard"]),
        "junk": (b"junk" * 1000, ["bad_shard"]),
    }
    for name, (content, expected) in cases.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content)
        assert outcomes(source_of(path)) == expected, name


def test_a_compressed_tar_is_one_clear_error(tmp_path, jpg):
    path = tar(tmp_path / "a.tar", {"1.jpg": jpg, "1.txt": b"A"})
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match="is a compressed tar"):
        source_of(path)


# --- ArrayRecord ----------------------------------------------------------------------------------


def array_record(path, records: list[bytes]):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_array_records_are_json_texts(tmp_path):
    rows = [json.dumps({"id": str(i), "messages": chat("Q", "A")}).encode() for i in range(5)]
    path = array_record(tmp_path / "a.array_record", [*rows, b"no json"])
    source = pickle.loads(pickle.dumps(source_of(path)))
    assert outcomes(source) == ["0", "1", "2", "3", "4", "bad_json"]
    assert parse_record(source[3]).line == 4


def test_array_records_that_cannot_be_used(tmp_path):
    example = array_record(tmp_path / "tfds.array_record", [b"\x0a\x10\x0a\x0e\x0a\x02id"])
    with pytest.raises(DataError, match="tf.train.Example"):
        source_of(example)
    with pytest.raises(DataError, match="local or on gs://"):
        ArrayRecordReader("s3://bucket/a.array_record")
    whole = array_record(tmp_path / "whole.array_record", [b"{}"] * 4).read_bytes()
    for name, content in (("cut", whole[:-100]), ("empty", b""), ("junk", b"junk" * 100)):
        path = tmp_path / f"{name}.array_record"
        path.write_bytes(content)
        source = source_of(path)
        assert len(source) == 1, name
        with pytest.raises(SampleError, match="bad_shard"):
            parse_record(source[0])
