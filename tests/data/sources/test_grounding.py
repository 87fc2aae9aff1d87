"""Molmo2's points and tracks as text, from Parquet rows with its columns."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ov2_jax.config.data import SourceConfig
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.layouts import to_sample
from ov2_jax.data.sources.parsing import parse_record

POINTS = {
    "id": "p",
    "video_id": "abc",
    "video_source": "youtube",
    "category": "object",
    "label": "cat",
    "question": "How many cats are there?",
    "count": 3,
    "video_duration": 20.0,
    "clip_start": None,
    "clip_end": None,
    "two_fps_timestamps": [0.5, 1.0],
    "points": [[{"x": 50.0, "y": 61.04}, {"x": 12.0, "y": 34.0}], [{"x": 0.5, "y": 100.0}]],
}
TRAJECTORY = {
    "id": "t",
    "video": "v1",
    "video_path": "any/v1.mp4",
    "expression": "the red ball",
    "task": "track",
    "fps": 30,
    "sampling_fps": 2,
    "width": 200,
    "height": 100,
    "frame_trajectories": [
        {
            "frame": 15,
            "time": 0.5,
            "points": [
                {"id": 0, "point": [20.0, 50.0], "occluded": False},
                {"id": 7, "point": [10.0, 50.0], "occluded": False},
            ],
        },
        {"frame": 0, "time": 0.0, "points": [{"id": 0, "point": [180.0, 10.0], "occluded": False}]},
        {"frame": 30, "time": 1.0, "points": [{"id": 0, "point": [1.0, 1.0], "occluded": True}]},
    ],
}
TRACK = {
    "id": "k",
    "exp": "dogs",
    "fps": 2,
    "w": 100,
    "h": 50,
    "clip": "c1",
    "video": "orig",
    "video_dataset": "sav",
    "mask_id": ["a", "b"],
    "points": [
        {"object_id": "a", "points": [[50.0, 25.0], [51.0, 25.0], [52.0, 25.0]]},
        {"object_id": "b", "points": [[10.0, 5.0], None, None]},
    ],
}


def read(tmp_path, row):
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    return parse_record(RecordSource([SourceConfig(str(tmp_path / "a.parquet"))])[0])


@pytest.mark.parametrize(
    ("row", "video", "question", "answer"),
    [
        (
            POINTS,
            "abc.mp4",
            "How many cats are there?",
            'Counting the <points coords="0.5 1 120 340 2 500 610;1.0 3 005 1000">cat</points> '
            "shows a total of 3.",
        ),
        (
            TRAJECTORY,
            "any/v1.mp4",
            "Track the red ball at 2 frames per second.",
            '<tracks coords="0.0 1 900 100;0.5 1 100 500 2 050 500">the red ball</tracks>',
        ),
        (
            TRACK,
            "sav/c1.mp4",
            "Track dogs at 1 frames per second.",
            '<tracks coords="0.0 1 100 100 2 500 500;1.0 2 520 500">dogs</tracks>',
        ),
    ],
)
def test_annotations_as_text(tmp_path, row, video, question, answer):
    record = read(tmp_path, row)
    assert record.id == row["id"] and record.videos == (str(tmp_path / video),)
    assert [m["content"] for m in record.messages] == [f"<video>\n{question}", answer]


def test_no_points_are_an_answer_too():
    sample = to_sample({**POINTS, "count": 0, "two_fps_timestamps": [], "points": []})
    assert sample["messages"][1]["content"] == "There are none."


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**POINTS, "clip_start": 2.0, "clip_end": 12.0}, "unsupported_field: clip_start"),
        ({**POINTS, "count": 4}, "bad_record: count is 4 for 3 points"),
        ({**POINTS, "two_fps_timestamps": [0.5]}, "bad_record: not as Molmo2 has it"),
        ({**POINTS, "points": [[{"x": 101.0, "y": 0.0}], []]}, "outside the frame"),
        ({**POINTS, "points": 3}, "bad_record"),
        ({**TRAJECTORY, "task": "ground"}, "unsupported_field: task is 'ground'"),
        ({**TRAJECTORY, "frame_trajectories": []}, "no object is visible"),
        ({**TRAJECTORY, "width": 0}, "bad_record: width is 0; it must be a positive number"),
        ({**TRACK, "fps": "2"}, "bad_record"),
        ({**TRACK, "fps": 0.1}, "bad_record: not as Molmo2 has it: ZeroDivisionError"),
    ],
)
def test_rows_that_cannot_be_read_say_why(row, words):
    with pytest.raises(SampleError, match=words):
        to_sample(row)
