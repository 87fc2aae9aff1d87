"""The one record form: samples of all sources behind one index, and their parsing.

Readers (ov2_jax/data/readers) bring rows and layouts.py puts them into this form: a sample is
`{id, messages: [{role, content}], images, videos}` or LLaVA's
`{id, conversations: [{from: human|gpt|system, value}], image, video}`; `<image>` and `<video>` in a
question mark places. Optional: `fps` (of the clips; for their seconds), `timestamp_decimal`, `task`
(kept for evaluation). Media are one or a list of: a path relative to the source's root, `{bytes,
path}` with the file's bytes (the path is then a name only), or, in JSON, `{base64, path}`.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.layouts import to_sample
from ov2_jax.data.sources.media import Embedded, Media, Section

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class RawRecord(NamedTuple):
    """One sample as its file has it: JSON text, a row, or why it cannot be read."""

    data: bytes | Mapping[str, Any] | SampleError
    file: str
    line: int  # or row, counted from 1
    root: str
    source: str
    video_input: str = "uniform"  # of VIDEO_INPUTS


class Canvases(NamedTuple):
    """A clip that was made into pictures beforehand, with the files of its patches' positions."""

    images: tuple[Media, ...]
    positions: tuple[Media, ...]  # one for all pictures, or one a picture


class ClipPart(NamedTuple):
    """A clip of which only a section counts."""

    clip: Media
    section: Section


class Record(NamedTuple):
    """A parsed sample. Media are paths inside the root, or bytes; nothing is decoded yet."""

    id: str
    messages: tuple[Mapping[str, str], ...]  # {"role": user|assistant|system, "content": text}
    images: tuple[Media | np.ndarray, ...]  # arrays: decoded by TFDS, uint8 [H W 3]
    videos: tuple[Media | Canvases | ClipPart, ...]
    source: str
    file: str
    line: int
    video_input: str = "uniform"  # of VIDEO_INPUTS
    fps: tuple[float, ...] = ()  # none, one for all clips, or one a clip
    bit_costs: tuple[Media, ...] = ()  # none, or one a clip: .npz files, see codec/scores.py
    timestamp_decimal: int | None = None
    task: str = ""


# --- parsing --------------------------------------------------------------------------------------


def _bad(detail: str) -> SampleError:
    return SampleError("bad_record", detail)


def _messages(raw: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    name = "messages" if "messages" in raw else "conversations"
    role_key, text_key = ("role", "content") if name == "messages" else ("from", "value")
    turns = raw.get(name)
    if not isinstance(turns, list) or not turns:
        raise _bad("the sample needs a list `messages` or `conversations` with at least one turn")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
            raise _bad(f"{name}[{number}] must be an object with a string `{role_key}`")
        role, text = turn[role_key], turn.get(text_key)
        role = role if name == "messages" else _ROLES.get(role, "")
        if role not in _ROLES.values():
            raise SampleError("unknown_role", f"{name}[{number}].{role_key} is {turn[role_key]!r}")
        if not isinstance(text, str):
            raise _bad(f"{name}[{number}].{text_key} must be text with <image> and <video> marks")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which no tokenizer takes
            raise _bad(f"{name}[{number}].{text_key} is not valid Unicode") from error
        messages.append({"role": role, "content": text})
    return tuple(messages)


def inside_root(path: str, root: str) -> str:
    """The path under `root`, by its text: links may lead elsewhere, `..` and absolute paths not.

    Both may be remote (`gs://bucket/...`); a path with a scheme counts as absolute.
    """
    scheme, mark, inner = root.rpartition("://")
    path_scheme, _, path_inner = path.rpartition("://")
    base, given = PurePosixPath(inner), PurePosixPath(path_inner)
    parts: list[str] = []
    if given.is_absolute() or path_scheme:
        if path_scheme not in ("", scheme) or ".." in given.parts or not given.is_relative_to(base):
            raise SampleError("path_outside_root", f"{path} is not under the root {root}")
        return f"{scheme}{mark}{given}"
    for part in given.parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            raise SampleError("path_outside_root", f"{path} leads out of the root {root}")
    return f"{scheme}{mark}{base.joinpath(*parts)}"


def _medium(value: object, name: str, root: str) -> Media | np.ndarray:
    if isinstance(value, str) and value:
        return inside_root(value, root)
    if isinstance(value, Embedded | np.ndarray):
        return value
    if isinstance(value, bytes):
        return Embedded(value, name)
    if isinstance(value, Mapping):
        path, data = value.get("path"), value.get("bytes")
        if isinstance(value.get("base64"), str):
            try:
                data = base64.b64decode(value["base64"], validate=True)
            except (binascii.Error, ValueError) as error:
                raise _bad(f"{name}.base64 is not base64: {error}") from error
        if isinstance(data, bytes):
            return Embedded(data, f"{name} ({path})" if path else name)
        if data is None and isinstance(path, str) and path:
            return inside_root(path, root)
    raise _bad(f"{name} must be a path, or an object with `bytes` or a `path`")


def _media(raw: Mapping[str, Any], many: str, one: str, root: str) -> tuple[Any, ...]:
    value = raw.get(many) if raw.get(many) is not None else raw.get(one)
    values = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(_medium(v, f"{many}[{i}]", root) for i, v in enumerate(values))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_FPS_RANGE = 1e-6, 1e6


def _section(raw: Mapping[str, Any]) -> Section | None:
    """`start` and `end`, in seconds."""
    start, end = raw.get("start"), raw.get("end")
    if start is None and end is None:
        return None
    start = 0 if start is None else start
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (_number(value) and 0 <= value < 1e9):
            raise _bad(f"{name} is {value!r}; it must be a time in seconds")
    if end is not None and end <= start:
        raise _bad(f"end is {end}; it must be later than start, {start}")
    return Section(float(start), None if end is None else float(end))


def _fps(raw: Mapping[str, Any], clips: int) -> tuple[float, ...]:
    value = raw.get("fps")
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    low, high = _FPS_RANGE
    if not all(_number(v) and low <= v <= high for v in values):
        raise _bad(f"fps is {value!r}; it must be a number from {low:g} to {high:g}, or one a clip")
    if len(values) not in (1, clips):
        raise _bad(f"fps has {len(values)} values for {clips} clips")
    return tuple(float(v) for v in values)


def _id(data: Mapping[str, Any], raw: RawRecord) -> str:
    return str(data["id"]) if data.get("id") is not None else f"{raw.source}:{raw.line}"


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
        raise _bad(f"a sample must be a JSON object, not {type(data).__name__}")
    return data


def raw_id(raw: RawRecord) -> str:
    """The sample's own id as far as it can be read, else `source:line`."""
    try:
        return _id(_row(raw), raw)
    except SampleError:
        return _id({}, raw)


# Canvases stand in the place of their marks, which must follow one another.
_IMAGE_MARKS = re.compile(r"<image>(?:\s*<image>)*")


def _canvases(
    messages: tuple[Mapping[str, str], ...], images: tuple[Media, ...], positions: tuple[Media, ...]
) -> tuple[tuple[Mapping[str, str], ...], Canvases]:
    """All pictures of a sample as one clip, and its messages with one <video> for their marks."""
    if len(positions) not in (1, len(images)):
        raise _bad(
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


def parse_record(raw: RawRecord) -> Record:
    """Raises SampleError (bad_json, bad_record, unknown_role, unsupported_field, ...)."""
    data = to_sample(_row(raw))
    if data.get("positions_thw") is not None:
        raise SampleError(
            "unsupported_field", "positions_thw is not read; write .npy files and patch_positions"
        )
    messages = _messages(data)
    images = _media(data, "images", "image", raw.root)
    videos: tuple[Any, ...] = _media(data, "videos", "video", raw.root)
    section = _section(data) if videos else None
    if section is not None:
        if len(videos) > 1:
            raise _bad("start and end are those of one clip, and the sample has several")
        videos = (ClipPart(videos[0], section),)
    decimals = data.get("timestamp_decimal")
    if decimals is not None and (type(decimals) is not int or decimals not in range(7)):
        raise _bad(f"timestamp_decimal is {decimals!r}; it must be 0 to 6")
    task = data.get("task")
    if task is not None and not isinstance(task, str):
        raise _bad(f"task is {task!r}; it must be text")
    positions = _media(data, "patch_positions", "patch_positions", raw.root)
    if positions:
        if videos or not images:
            raise _bad("patch_positions are those of `images`, and no clips can stand beside them")
        messages, canvases = _canvases(messages, images, positions)
        images, videos = (), (canvases,)
    costs = _media(data, "bit_costs", "bit_cost", raw.root)
    if len(costs) not in (0, len(videos)):
        raise _bad(f"bit_costs has {len(costs)} files for {len(videos)} clips")
    return Record(
        id=_id(data, raw),
        messages=messages,
        images=images,
        videos=videos,
        source=raw.source,
        file=raw.file,
        line=raw.line,
        video_input=raw.video_input,
        fps=_fps(data, len(videos)),
        bit_costs=costs,
        timestamp_decimal=decimals,
        task=task or "",
    )
