"""Files of samples as random-access sources, and their parsing."""

import json
import pickle

import pytest

from ov2_jax.config.data import SourceConfig
from ov2_jax.core.errors import DataError
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.media_fields import inside_root
from ov2_jax.data.sources.parsing import parse_record
from ov2_jax.data.sources.records import RawRecord
from tests.data.files import chat, write_jsonl


def parse(sample: dict | str, root: str = "/data"):
    data = sample if isinstance(sample, str) else json.dumps(sample)
    return parse_record(RawRecord(data.encode(), "file.jsonl", 3, root, "source"))


def test_jsonl_is_read_by_line_in_any_order(tmp_path):
    first = write_jsonl(
        tmp_path / "a.jsonl", [{"id": "ä"}, "", "{broken", "   ", {"id": "last", "x": "中文"}]
    )
    with first.open("ab") as file:
        file.write(b'{"id": "no newline"}')
    second = write_jsonl(tmp_path / "b.jsonl", [{"id": "b"}])
    source = RecordSource(
        [SourceConfig(str(first)), SourceConfig(str(second), root="/r", name="named")]
    )
    source = pickle.loads(pickle.dumps(source))  # as it goes to worker processes
    assert len(source) == 5
    assert [source[i].line for i in (4, 0, 3, 1, 2)] == [1, 1, 6, 3, 5]
    assert json.loads(source[2].data) == {"id": "last", "x": "中文"}
    assert json.loads(source[3].data)["id"] == "no newline"
    assert source[0][1:] == (str(first), 1, str(tmp_path), "a", "uniform")
    assert source[4][1:] == (str(second), 1, "/r", "named", "uniform")
    with pytest.raises(SampleError, match="bad_json"):
        parse_record(source[1])


def test_a_json_list_is_read_by_element(tmp_path):
    samples = [{"id": "ü", "n": [1, {"a": "]}"}]}, {"id": "2"}, {"id": "3"}]
    path = tmp_path / "a.json"
    for text in (
        json.dumps(samples),
        json.dumps(samples, indent=2, ensure_ascii=False),
        "\ufeff \n[" + ",\n".join(json.dumps(s) for s in samples) + "\n]\n",
    ):
        path.write_text(text, "utf-8")
        source = RecordSource([SourceConfig(str(path))])
        assert [json.loads(source[i].data) for i in range(3)] == samples
    assert [source[i].line for i in range(3)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"id": 1}', "must hold one JSON list"),
        ('[{"id": 1}', "the end of the file"),
        ('[{"id": 1},]', r"must hold one JSON list"),
        ('[{"id": }]', "broken JSON"),
        ("[1, 2]", "must hold one JSON list"),
        ("", "must hold one JSON list"),
        ("[]", "no sample"),
    ],
)
def test_a_broken_json_list_is_one_clear_error(tmp_path, text, words):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        RecordSource([SourceConfig(str(path))])


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        RecordSource([SourceConfig(str(tmp_path / "none.jsonl"))])
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no sample"):
        RecordSource([SourceConfig(str(tmp_path / "empty.jsonl"))])


def test_both_forms_of_a_sample():
    messages = parse(
        {
            "id": 7,
            "messages": chat("<image>Q", "A", system="S"),
            "images": ["x/a.jpg"],
            "videos": ["v.mp4", "w.mp4"],
            "fps": [2, 3.5],
            "timestamp_decimal": 2,
            "task": "count",
        }
    )
    assert messages.id == "7" and messages.images == ("/data/x/a.jpg",)
    assert messages.videos == ("/data/v.mp4", "/data/w.mp4")
    assert messages.fps == (2.0, 3.5) and messages.timestamp_decimal == 2
    assert messages.task == "count"
    assert (messages.file, messages.line, messages.source) == ("file.jsonl", 3, "source")
    llava = parse(
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "<image>Q"},
                {"from": "gpt", "value": "A"},
            ],
            "image": "x/a.jpg",
            "video": ["v.mp4", "w.mp4"],
        }
    )
    assert llava.id == "source:3"
    assert llava[1:4] == messages[1:4]
    assert parse({"messages": chat("Q", "A")}).images == ()


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ("{", "bad_json"),
        ("[" * 100_000, "bad_json"),
        ("[]", "bad_record"),
        ({"id": 1}, "bad_record"),
        ({"messages": []}, "bad_record"),
        ({"messages": ["Q"]}, "bad_record"),
        ({"messages": [{"role": "user"}]}, "bad_record"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "bad_record"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "bad_record"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown_role"),
        ({"conversations": [{"from": "user", "value": "x"}]}, "unknown_role"),
        ({"messages": chat("Q", "A"), "images": [{"bytes": "x"}]}, "bad_record"),
        ({"messages": chat("Q", "A"), "images": 3}, "bad_record"),
        ({"messages": chat("Q", "A"), "fps": 0}, "bad_record"),
        ({"messages": chat("Q", "A"), "fps": "2"}, "bad_record"),
        ({"messages": chat("Q", "A"), "fps": [1, 2], "videos": ["v"]}, "bad_record"),
        ({"messages": chat("Q", "A"), "timestamp_decimal": 1.5}, "bad_record"),
        ({"messages": chat("Q", "A"), "task": 1}, "bad_record"),
        ({"messages": chat("Q", "A"), "positions_thw": [[0, 0, 0]]}, "unsupported_field"),
        ({"messages": chat("Q", "A"), "patch_positions": ["a.npy"]}, "bad_record"),
        ({"messages": chat("Q", "A"), "positions_thw": "a.npy"}, "unsupported_field"),
        ({"messages": chat("Q", "A"), "images": ["../secret.jpg"]}, "path_outside_root"),
        ({"messages": chat("Q", "A"), "videos": ["/etc/passwd"]}, "path_outside_root"),
    ],
)
def test_bad_samples_say_why(sample, reason):
    with pytest.raises(SampleError) as error:
        parse(sample)
    assert error.value.reason == reason


def test_paths_stay_inside_the_root():
    assert inside_root("a/./b/../c.jpg", "/data") == "/data/a/c.jpg"
    assert inside_root("/data/a.jpg", "/data") == "/data/a.jpg"
    assert inside_root("a.jpg", "../data") == "../data/a.jpg"
    assert inside_root("/anywhere/a.jpg", "/") == "/anywhere/a.jpg"
    for path in ("../a", "a/../../b", "/data/../a", "/database/a", "a/b/../../../data/c"):
        with pytest.raises(SampleError, match="path_outside_root"):
            inside_root(path, "/data")
