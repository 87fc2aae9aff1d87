"""Molmo2's point and track annotations as questions and answers.

The answer's text is Molmo2's own (its "html-v2" form): coordinates are thousandths of the width and
height with at least three digits, frames are separated by `;` and start with their time in seconds,
and each point has a number: `<points coords="0.5 1 120 340 2 500 610;1.0 3 130 338">cat</points>`.
Points of a frame are sorted by (x, y), and numbers go on from frame to frame. In tracks the number
is the object's, by first appearance, and hidden objects are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ov2_jax.core.errors import describe
from ov2_jax.data.rejected import SampleError, bad_record

Row = Mapping[str, Any]
Convert = Callable[[Row], dict[str, Any]]
_TRACKS_PER_SECOND = 1  # VideoTrack has points for every frame; their text would not fit
_LARGEST = 1e9  # of seconds, pixels, and frames a second


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise bad_record(f"{name} is {row[name]!r}; it must be text")
    return row[name]


def _positive(row: Row, name: str) -> float:
    """Finite, and not so large that dividing by it gives 0."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
        raise bad_record(f"{name} is {value!r}; it must be a positive number")
    return value


def _thousandths(x: float, y: float, width: float, height: float) -> tuple[int, int]:
    x, y = x / width, y / height
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise bad_record(f"the point ({x:g}, {y:g}) lies outside the frame")
    return round(1000 * x), round(1000 * y)


def _frame(seconds: float, points: Sequence[tuple[int, tuple[int, int]]]) -> str:
    if not 0 <= seconds < _LARGEST:
        raise bad_record(f"a frame's time is {seconds!r}; it must be seconds from 0 on")
    return f"{seconds:.1f} " + " ".join(f"{n} {x:03d} {y:03d}" for n, (x, y) in points)


def _sample(row: Row, video: str, question: str, answer: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"<video>\n{question}"},
        {"role": "assistant", "content": answer},
    ]
    return {"id": row.get("id"), "messages": messages, "video": video}


def _guarded(convert: Convert) -> Convert:
    """Rejects a row as bad_record if its values have other types than the layout's."""

    def converted(row: Row) -> dict[str, Any]:
        try:
            return convert(row)
        except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError) as error:
            raise bad_record(f"not as Molmo2 has it: {describe(error)}") from error

    return converted


@_guarded
def video_points(row: Row) -> dict[str, Any]:
    """Molmo2-VideoPoint: points (in percent) at `two_fps_timestamps`, and their `count`."""
    start, end = row.get("clip_start"), row.get("clip_end")
    if (start or 0) > 0 or (end is not None and end < row["video_duration"]):
        raise SampleError(
            "unsupported_field",
            "clip_start and clip_end name a section, and the points are those of that section; cut "
            "it out of the clip, shift two_fps_timestamps, and drop both fields",
        )
    times, points = row["two_fps_timestamps"], row["points"]
    label, question = _text(row, "label"), _text(row, "question")
    frames, number = [], 1
    for seconds, in_frame in zip(times, points, strict=True):
        scaled = sorted(_thousandths(p["x"], p["y"], 100, 100) for p in in_frame)
        if scaled:
            frames.append(_frame(seconds, list(enumerate(scaled, number))))
            number += len(scaled)
    if number - 1 != row["count"]:
        raise bad_record(f"count is {row['count']} for {number - 1} points")
    coords = ";".join(frames)
    answer = "There are none."
    if frames:
        text = f'<points coords="{coords}">{label}</points>'
        answer = f"Counting the {text} shows a total of {number - 1}."
    video = row.get("video") or f"{row['video_id']}.mp4"
    return _sample(row, video, question, answer)


def _tracks(
    row: Row,
    label: str,
    video: str,
    per_second: float,
    frames: Sequence[tuple[float, Mapping[Any, Sequence[float]]]],
    size: tuple[float, float],
) -> dict[str, Any]:
    """`frames`: (seconds, visible points by object); `size`: width and height."""
    numbers: dict[Any, int] = {}
    texts = []
    for seconds, points in frames:
        scaled = sorted((_thousandths(*point, *size), key) for key, point in points.items())
        for _, key in scaled:
            numbers.setdefault(key, len(numbers) + 1)
        if scaled:
            texts.append(_frame(seconds, sorted((numbers[key], point) for point, key in scaled)))
    if not texts:
        raise bad_record("no object is visible at any time")
    coords = ";".join(texts)
    question = f"Track {label} at {per_second} frames per second."
    return _sample(row, video, question, f'<tracks coords="{coords}">{label}</tracks>')


@_guarded
def frame_trajectories(row: Row) -> dict[str, Any]:
    """MolmoPoint-TrackAny, -TrackSyn and the academic track sets (task "track")."""
    if row["task"] != "track":
        raise SampleError("unsupported_field", f"task is {row['task']!r}; only 'track' is read")
    frames = [
        (frame["time"], {p["id"]: p["point"] for p in frame["points"] if not p["occluded"]})
        for frame in sorted(row["frame_trajectories"], key=lambda frame: frame["time"])
    ]
    video = row.get("video_path") or f"{row['video']}.mp4"
    size = _positive(row, "width"), _positive(row, "height")
    label, per_second = _text(row, "expression"), _positive(row, "sampling_fps")
    return _tracks(row, label, video, per_second, frames, size)


@_guarded
def video_track(row: Row) -> dict[str, Any]:
    """Molmo2-VideoTrack: a point for each frame and object; the text has one frame a second."""
    fps = _positive(row, "fps")
    step = round(fps / _TRACKS_PER_SECOND)
    by_frame: dict[int, dict[Any, Sequence[float]]] = {}
    for track in row["points"]:
        for frame, point in enumerate(track["points"]):
            if point and frame % step == 0:
                by_frame.setdefault(frame, {})[track["object_id"]] = point
    frames = [(frame / fps, by_frame[frame]) for frame in sorted(by_frame)]
    video = f"{row['video_dataset']}/{row['clip']}.mp4"
    size = _positive(row, "w"), _positive(row, "h")
    return _tracks(row, _text(row, "exp"), video, _TRACKS_PER_SECOND, frames, size)
