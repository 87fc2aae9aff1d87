"""Layouts of published data sets: a row with their columns becomes a sample of the one record form.

A layout is recognised by the columns it needs, in any container (JSON, Parquet, tar, ArrayRecord,
TFDS). docs/data.md has the table. Rows of an unknown layout are refused: a guess at which text is
the question could train on nonsense unnoticed.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ov2_jax.core.errors import DataError
from ov2_jax.data.rejected import bad_record
from ov2_jax.data.sources import grounding

Row = Mapping[str, Any]

# Fields of the record form, which every layout passes on.
_MEDIA = ("image", "images", "video", "videos")
_FIELDS = (
    "id",
    *_MEDIA,
    "start",
    "end",
    "fps",
    "timestamp_decimal",
    "task",
    "patch_positions",
    "positions_thw",
    "bit_cost",
    "bit_costs",
)


class Layout(NamedTuple):
    """`needs`: the columns that identify it; `reads`: the optional columns that it uses."""

    name: str
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]


def _turns(question: str, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _record_form(row: Row) -> dict[str, Any]:
    return dict(row)


def _has_text(turn: object) -> bool:
    return isinstance(turn, Mapping) and isinstance(turn.get("value"), str)


def _conversations(row: Row) -> dict[str, Any]:
    """LLaVA's form. Its video sets (LLaVA-Video-178K) mark the clip `<image>`, which is read as
    `<video>` if the sample has clips, no pictures and no `<video>`."""
    has = {name for name in _MEDIA if row.get(name)}
    turns = row["conversations"]
    if not has or not has <= {"video", "videos"} or not isinstance(turns, list):
        return dict(row)
    texts = [t["value"] for t in turns if _has_text(t)]
    if any("<video>" in text for text in texts):
        return dict(row)
    turns = [
        {**t, "value": t["value"].replace("<image>", "<video>")} if _has_text(t) else t
        for t in turns
    ]
    return {**row, "conversations": turns}


def _finevision(row: Row) -> dict[str, Any]:
    """FineVision: `texts` are rounds; unmarked pictures are put before the first question."""
    rounds = row["texts"]
    if not isinstance(rounds, list) or not all(isinstance(r, Mapping) for r in rounds):
        raise bad_record("texts must be a list of {user, assistant}")
    messages = [turn for r in rounds for turn in _turns(r.get("user"), r.get("assistant"))]
    images = row["images"]
    if not isinstance(images, list):
        raise bad_record("images must be a list")
    asked = [m["content"] for m in messages[::2]]
    if asked and all(isinstance(q, str) and "<image>" not in q for q in asked):
        messages[0]["content"] = "<image>\n" * len(images) + asked[0]
    return {**row, "messages": messages}


def _caption(row: Row) -> dict[str, Any]:
    """A picture and its caption (LLaVA-OneVision-1.5 mid-training): the picture is the question."""
    return {**row, "messages": _turns("<image>", row["caption"])}


_TURNS = "a list `messages` or `conversations`"
LAYOUTS = (
    Layout("messages", ("messages",), _FIELDS, _record_form),
    Layout("conversations", ("conversations",), _FIELDS, _conversations),
    Layout("FineVision", ("images", "texts"), _FIELDS, _finevision),
    Layout(
        "Molmo2-VideoPoint",
        ("two_fps_timestamps", "points", "label", "count", "question", "video_id"),
        ("id", "video", "clip_start", "clip_end", "video_duration"),
        grounding.video_points,
    ),
    Layout(
        "Molmo2-VideoTrack",
        ("points", "exp", "fps", "w", "h", "clip", "video_dataset"),
        ("id",),
        grounding.video_track,
    ),
    Layout(
        "MolmoPoint-Track",
        ("frame_trajectories", "expression", "task", "sampling_fps", "width", "height", "video"),
        ("id", "video_path"),
        grounding.frame_trajectories,
    ),
    Layout("caption", ("image", "caption"), _FIELDS, _caption),
)


def find_layout(columns: Iterable[str]) -> Layout | None:
    """The first layout whose needed columns are all there."""
    columns = set(columns)
    return next((x for x in LAYOUTS if columns.issuperset(x.needs)), None)


def layout_of(columns: Iterable[str], file: str) -> tuple[Layout, list[str]]:
    """The layout of a file with a schema, and its columns that are read. Raises DataError."""
    columns = list(columns)
    layout = find_layout(columns)
    if layout is None:
        known = "; ".join(f"{x.name}: {' + '.join(x.needs)}" for x in LAYOUTS)
        raise DataError(
            f"{file} has the columns {', '.join(columns)}, which is no known layout ({known}). "
            "Rename its columns, or write it as JSONL of the documented form."
        )
    return layout, [c for c in columns if c in layout.needs or c in layout.reads]


def to_sample(row: Row) -> dict[str, Any]:
    """The row in the record form: `messages` or `conversations`, and media. Raises SampleError."""
    layout = find_layout(name for name, value in row.items() if value is not None)
    if layout is None:
        raise bad_record(
            f"the sample needs {_TURNS} with at least one turn, or another known layout; it has "
            f"{', '.join(map(str, row)) or 'no field'}",
        )
    return layout.convert(row)
