"""Raw records to records of the one form (records.py), or SampleErrors."""

import json
import re
from collections.abc import Mapping
from typing import Any

from ov2_jax.data.rejected import SampleError, bad_record
from ov2_jax.data.sources.layouts import to_sample
from ov2_jax.data.sources.media import MediaValue
from ov2_jax.data.sources.media_fields import fps_of, media_of, section_of
from ov2_jax.data.sources.records import Canvases, ClipPart, RawRecord, Record

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def parse_record(raw: RawRecord) -> Record:
    """Raises SampleError (bad_json, bad_record, unknown_role, unsupported_field, ...)."""
    row = to_sample(_row(raw))
    if row.get("positions_thw") is not None:
        raise SampleError(
            "unsupported_field", "positions_thw is not read; write .npy files and patch_positions"
        )
    messages = _messages(row)
    images = media_of(row, "images", "image", raw.root)
    videos: tuple[Any, ...] = media_of(row, "videos", "video", raw.root)
    section = section_of(row) if videos else None
    if section is not None:
        if len(videos) > 1:
            raise bad_record("start and end are those of one clip, and the sample has several")
        videos = (ClipPart(videos[0], section),)
    decimals = row.get("timestamp_decimal")
    if decimals is not None and (type(decimals) is not int or decimals not in range(7)):
        raise bad_record(f"timestamp_decimal is {decimals!r}; it must be 0 to 6")
    task = row.get("task")
    if task is not None and not isinstance(task, str):
        raise bad_record(f"task is {task!r}; it must be text")
    positions = media_of(row, "patch_positions", "patch_positions", raw.root)
    if positions:
        if videos or not images:
            raise bad_record("patch_positions need `images`, and the sample cannot have clips too")
        messages, canvases = _canvases(messages, images, positions)
        images, videos = (), (canvases,)
    costs = media_of(row, "bit_costs", "bit_cost", raw.root)
    if len(costs) not in (0, len(videos)):
        raise bad_record(f"bit_costs has {len(costs)} files for {len(videos)} clips")
    return Record(
        id=_id(row, raw),
        messages=messages,
        images=images,
        videos=videos,
        source=raw.source,
        file=raw.file,
        line=raw.line,
        video_input=raw.video_input,
        fps=fps_of(row, len(videos)),
        bit_costs=costs,
        timestamp_decimal=decimals,
        task=task or "",
    )


def raw_id(raw: RawRecord) -> str:
    """The sample's own id if it can be read, else `source:line`."""
    try:
        return _id(_row(raw), raw)
    except SampleError:
        return _id({}, raw)


def _id(row: Mapping[str, Any], raw: RawRecord) -> str:
    return str(row["id"]) if row.get("id") is not None else f"{raw.source}:{raw.line}"


def _row(raw: RawRecord) -> Mapping[str, Any]:
    """Raises SampleError."""
    data = raw.data
    if isinstance(data, SampleError):
        raise data
    if isinstance(data, bytes):
        try:
            data = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SampleError("bad_json", str(error)) from error
    if not isinstance(data, Mapping):
        raise bad_record(f"a sample must be a JSON object, not {type(data).__name__}")
    return data


def _messages(row: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    name = "messages" if "messages" in row else "conversations"
    role_key, text_key = ("role", "content") if name == "messages" else ("from", "value")
    turns = row.get(name)
    if not isinstance(turns, list) or not turns:
        raise bad_record(
            "the sample needs a list `messages` or `conversations` with at least one turn"
        )
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
            raise bad_record(f"{name}[{number}] must be an object with a string `{role_key}`")
        role, text = turn[role_key], turn.get(text_key)
        role = role if name == "messages" else _ROLES.get(role, "")
        if role not in _ROLES.values():
            raise SampleError("unknown_role", f"{name}[{number}].{role_key} is {turn[role_key]!r}")
        if not isinstance(text, str):
            raise bad_record(
                f"{name}[{number}].{text_key} must be text with <image> and <video> marks"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which no tokenizer takes
            raise bad_record(f"{name}[{number}].{text_key} is not valid Unicode") from error
        messages.append({"role": role, "content": text})
    return tuple(messages)


# Canvases take the place of their marks, which must follow one another.
_IMAGE_MARKS = re.compile(r"<image>(?:\s*<image>)*")


def _canvases(
    messages: tuple[Mapping[str, str], ...],
    images: tuple[MediaValue, ...],
    positions: tuple[MediaValue, ...],
) -> tuple[tuple[Mapping[str, str], ...], Canvases]:
    """All pictures of a sample as one clip, and its messages with one <video> for their marks."""
    if len(positions) not in (1, len(images)):
        raise bad_record(
            f"patch_positions has {len(positions)} files for {len(images)} pictures; give one, or "
            "one a picture"
        )
    runs = [run for m in messages for run in _IMAGE_MARKS.findall(m["content"])]
    if [run.count("<image>") for run in runs] != [len(images)]:
        raise SampleError(
            "placeholder_mismatch",
            f"the pictures of patch_positions are one clip: {len(images)} <image> marks must "
            "follow one another",
        )
    messages = tuple({**m, "content": _IMAGE_MARKS.sub("<video>", m["content"])} for m in messages)
    return messages, Canvases(images, positions)
