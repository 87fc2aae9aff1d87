"""Published column layouts as samples, from Parquet files that pyarrow writes."""

import base64
import json
import pickle
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ov2_jax.config.data import SourceConfig
from ov2_jax.core.errors import ConfigError, DataError
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.rejected import Rejected, SampleError
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.layouts import to_sample
from ov2_jax.data.sources.media import Embedded
from ov2_jax.data.sources.parsing import parse_record
from tests.data.files import chat, clip, fill_bucket, picture, write_jsonl
from tests.tiny import data_config, tiny_model, tokenizer


@pytest.fixture(scope="module")
def png(tmp_path_factory):
    return picture(tmp_path_factory.mktemp("png") / "a.png", 60, 90).read_bytes()


def parquet(path, rows: list[dict], **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def records(*paths, **config):
    source = RecordSource([SourceConfig(str(p), **config) for p in paths])
    return [parse_record(source[i]) for i in range(len(source))]


def encode(raw):
    return SampleEncoder(data_config(), tiny_model(), tokenizer())(raw)


# --- layouts --------------------------------------------------------------------------------------


def test_llava_next_and_onevision_instruct(tmp_path, png):
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    text = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    rows = [
        {
            "id": "x",
            "conversations": turns,
            "image": {"bytes": png, "path": "../name/only.png"},
            "data_source": "ai2d",
        },
        {"id": "y", "conversations": text, "image": None, "data_source": "text"},
        {"id": "z", "conversations": turns, "image": {"bytes": None, "path": "a.png"}},
    ]
    path = parquet(tmp_path / "train-0.parquet", rows)
    one, two, three = records(path)
    assert one.id == "x" and one.images[0].data == png
    assert "only.png" in str(one.images[0]) and (one.file, one.line) == (str(path), 1)
    assert list(one.messages) == chat("<image>\nQ", "A")
    assert two.images == () and three.images == (str(tmp_path / "a.png"),)


def test_finevision(tmp_path, png):
    image = {"bytes": png, "path": None}
    rounds = [{"user": "What?", "assistant": "A"}, {"user": "And?", "assistant": "B"}]
    marked = [{"user": "Is <image> older than <image>?", "assistant": "A"}]
    rows = [
        {"images": [image], "texts": rounds, "source": "ai2d", "relevance_ratings": [5, 4]},
        {"images": [image, image], "texts": marked, "source": "x", "relevance_ratings": [1]},
    ]
    one, two = records(parquet(tmp_path / "a.parquet", rows))
    assert list(one.messages) == chat("<image>\nWhat?", "A", "And?", "B")
    assert two.messages[0]["content"] == "Is <image> older than <image>?"
    assert [len(one.images), len(two.images)] == [1, 2]
    assert one.id == "a:1"


def test_onevision_mid_training_captions(tmp_path, png):
    rows = [{"id": "coyo/1.jpg", "image": {"bytes": png, "path": "1.jpg"}, "caption": "A dog."}]
    (record,) = records(parquet(tmp_path / "a.parquet", rows))
    assert list(record.messages) == chat("<image>", "A dog.") and record.id == "coyo/1.jpg"


def test_llava_video_178k_marks_its_clips_image():
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"}]
    row = {"id": "1", "conversations": turns, "data_source": "0_30_s", "video": "a/b.mp4"}
    assert to_sample(row)["conversations"][0]["value"] == "<video>\nWhat?"
    for other in ({"image": "a.jpg"}, {"image": "a.jpg", "video": "b.mp4"}):
        sample = to_sample({"conversations": turns, **other})
        assert sample["conversations"] == turns
    both = [{"from": "human", "value": "<video> <image>"}, turns[1]]
    assert to_sample({"conversations": both, "video": "b.mp4"})["conversations"] == both


def test_a_section_of_a_clip_is_kept():
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "A"}]
    row = {"conversations": turns, "video": "a.mp4", "start": 1.0, "end": 2.0}
    assert (to_sample(row)["start"], to_sample(row)["end"]) == (1.0, 2.0)
    assert to_sample({**row, "start": None, "end": None})["video"] == "a.mp4"


def test_an_unknown_layout_is_one_clear_error(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"question": "Q", "answer": "A"}])
    with pytest.raises(DataError, match="columns question, answer, which is no known layout"):
        records(path)
    with pytest.raises(SampleError, match="images must be a list"):
        to_sample({"images": {"path": "a"}, "texts": [{"user": "Q", "assistant": "A"}]})
    with pytest.raises(SampleError, match="it has question, answer"):
        to_sample({"question": "Q", "answer": "A"})


# --- media ----------------------------------------------------------------------------------------


def test_embedded_media_are_encoded_like_files(tmp_path, png):
    (tmp_path / "a.png").write_bytes(png)
    film = clip(tmp_path / "a.mp4", 12, 6).read_bytes()
    asked = chat("<image><video>?", "A")

    def base64_of(data):
        return {"base64": base64.b64encode(data).decode()}

    rows = [
        {"messages": asked, "images": ["a.png"], "videos": ["a.mp4"]},
        {"messages": asked, "images": [base64_of(png)], "videos": [base64_of(film)]},
    ]
    source = RecordSource([SourceConfig(str(write_jsonl(tmp_path / "a.jsonl", rows)))])
    one, two = encode(source[0]), encode(source[1])
    assert (one.patches == two.patches).all() and (one.tokens == two.tokens).all()
    assert len(one.patches) > 0


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"base64": "#"}, "bad_record"),
        ({"bytes": None, "path": None}, "bad_record"),
        ({"bytes": None, "path": "../a.png"}, "path_outside_root"),
        ({"base64": base64.b64encode(b"no picture").decode()}, "bad_image"),
        ({"path": "none.png"}, "missing_file"),
    ],
)
def test_bad_media_say_why(tmp_path, image, reason):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("<image>", "A"), "image": image}])
    result = encode(RecordSource([SourceConfig(str(path))])[0])
    assert isinstance(result, Rejected) and result.reason == reason


def test_remote_files_are_read_like_local_ones(tmp_path, png):
    rows = [{"messages": chat("<image>", "A"), "image": "pictures/a.png"}, {"messages": []}]
    fill_bucket(
        {
            "remote/data/a.jsonl": "\n".join(map(json.dumps, rows)).encode(),
            "remote/data/pictures/a.png": png,
            "remote/data/b.parquet": parquet(tmp_path / "b.parquet", rows[:1]).read_bytes(),
            "remote/data/a.mp4": clip(tmp_path / "a.mp4", 12, 6).read_bytes(),
        }
    )
    for name in ("a.jsonl", "*.parquet"):
        source = RecordSource([SourceConfig(f"s3://remote/data/{name}")])
        raw = source[0]
        assert raw.root == "s3://remote/data"
        assert len(encode(raw).patches) > 0
    assert raw.file == "s3://remote/data/b.parquet"
    row = {"messages": chat("<video>", "A"), "video": "a.mp4"}
    assert len(encode(raw._replace(data=row)).windows) == 2
    row = {"messages": chat("<image>", "A"), "image": "none.png"}
    assert encode(raw._replace(data=row)).reason == "missing_file"
    row = {"messages": chat("<image>", "A"), "image": "gs://other/a.png"}
    with pytest.raises(SampleError, match="path_outside_root"):
        parse_record(raw._replace(data=row))


# --- Parquet --------------------------------------------------------------------------------------


def test_parquet_rows_in_any_order_and_many_files(tmp_path):
    for shard in range(2):
        rows = [{"id": f"{shard}-{i}", "messages": chat("Q", "A")} for i in range(7)]
        parquet(tmp_path / f"train-{shard}.parquet", rows, row_group_size=3)
    source = RecordSource([SourceConfig(str(tmp_path / "train-*.parquet"))])
    source = pickle.loads(pickle.dumps(source))
    assert len(source) == 14
    ids = [parse_record(source[i]).id for i in (13, 0, 6, 7, 2, 3)]
    assert ids == ["1-6", "0-0", "0-6", "1-0", "0-2", "0-3"]
    assert (source[9].line, source[9].file) == (3, str(tmp_path / "train-1.parquet"))
    with pytest.raises(DataError, match="does not exist"):
        RecordSource([SourceConfig(str(tmp_path / "test-*.parquet"))])


def test_a_damaged_parquet_file_spoils_only_its_rows(tmp_path, png):
    rows = [{"id": str(i), "image": {"bytes": png, "path": "a"}, "caption": "A"} for i in range(9)]
    good = parquet(
        tmp_path / "a.parquet", rows, row_group_size=3, use_dictionary=False
    ).read_bytes()
    at = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(1).data_page_offset
    (tmp_path / "flipped.parquet").write_bytes(good[:at] + b"\xff" * 400 + good[at + 400 :])
    (tmp_path / "cut.parquet").write_bytes(good[:-50])
    (tmp_path / "empty.parquet").write_bytes(b"")
    source = RecordSource([SourceConfig(str(tmp_path / "*.parquet"))])
    results = [encode(source[i]) for i in range(len(source))]
    reasons = [r.reason if isinstance(r, Rejected) else r.id for r in results]
    whole = [str(i) for i in range(9)]
    flipped = [*whole[:3], *["bad_shard"] * 3, *whole[6:]]
    assert reasons == [*whole, "bad_shard", "bad_shard", *flipped]
    assert {(r.file, r.line) for r in results if isinstance(r, Rejected)} >= {
        (str(tmp_path / "cut.parquet"), 1),
        (str(tmp_path / "flipped.parquet"), 5),
    }


def test_bad_text_spoils_only_its_row(tmp_path):
    texts = pa.array([b"A", b"\xff\xfe", b"B"], pa.binary()).view(pa.string())
    images = pa.array(["a.png"] * 3)
    pq.write_table(pa.table({"image": images, "caption": texts}), tmp_path / "a.parquet")
    source = RecordSource([SourceConfig(str(tmp_path / "a.parquet"))])
    assert parse_record(source[2]).messages[1]["content"] == "B"
    with pytest.raises(SampleError, match="bad_record: a text is not UTF-8"):
        parse_record(source[1])


def test_a_file_that_vanishes_is_a_rejected_sample(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "1", "messages": chat("Q", "A")}])
    source = RecordSource([SourceConfig(str(path))])
    path.unlink()
    assert encode(source[0]).reason == "bad_shard"


def test_a_scheme_that_cannot_be_opened_is_one_clear_error(monkeypatch):
    words = "{} has the scheme {}://, which is not supported; a path is local or starts with gs://"
    for path in ("http://x/a.jsonl", "memory://x/a.jsonl"):
        with pytest.raises(ConfigError, match=words.format(path, path.split(":")[0])):
            SourceConfig(path)
    with pytest.raises(ConfigError, match=words.format("http://x", "http")):
        SourceConfig("a.jsonl", root="http://x")
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(DataError, match="az://x/a.jsonl cannot be opened: .*adlfs"):
        RecordSource([SourceConfig("az://x/a.jsonl")])


def test_formats_are_told_by_suffix_or_config(tmp_path):
    path = write_jsonl(tmp_path / "lines.txt", [{"id": "1", "messages": chat("Q", "A")}])
    assert records(path, format="jsonl")[0].id == "1"
    with pytest.raises(ConfigError, match="source.path is .*lines.txt"):
        SourceConfig(str(path))
    with pytest.raises(ConfigError, match="source.format is 'csv'"):
        SourceConfig(str(path), format="csv")


def test_bytes_have_a_name_for_people():
    assert f"{Embedded(b'', 'images[0] (a.png)')}" == "images[0] (a.png)"
