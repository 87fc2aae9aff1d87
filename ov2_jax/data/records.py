"""Samples on disk: JSON and JSONL files as random-access sources of raw records, and their parsing.

A sample is `{id, messages: [{role, content}], images, videos}` or LLaVA's
`{id, conversations: [{from: human|gpt|system, value}], image, video}`; `<image>` and `<video>` in a
question mark places. Optional: `fps` (of the clips; for their seconds), `timestamp_decimal`, `task`
(kept for evaluation). Media are a path or a list of paths, relative to the source's root.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ov2_jax.data.config import SourceConfig
from ov2_jax.data.errors import DataError, SampleError

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class RawRecord(NamedTuple):
    """One sample's bytes and where they came from."""

    data: bytes
    file: str
    line: int  # counted from 1
    root: str
    source: str


class Record(NamedTuple):
    """A parsed sample. Media are paths inside the root; nothing is opened yet."""

    id: str
    messages: tuple[Mapping[str, str], ...]  # {"role": user|assistant|system, "content": text}
    images: tuple[str, ...]
    videos: tuple[str, ...]
    source: str
    file: str
    line: int
    fps: tuple[float, ...] = ()  # none, one for all clips, or one a clip
    timestamp_decimal: int | None = None
    task: str = ""


# --- reading --------------------------------------------------------------------------------------


def _jsonl_index(path: Path) -> np.ndarray:
    """int64 [n, 3]: start and end byte and line number of every line that is not blank."""
    index, start = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                index.append((start, start + len(line), number))
            start += len(line)
    return np.array(index, np.int64).reshape(-1, 3)


def _json_index(path: Path) -> np.ndarray:
    """The same for the elements of one JSON list. A broken list has no known rest: DataError."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from error
    decoder = json.JSONDecoder()
    index, at, byte, line, seen = [], 0, 0, 1, 0

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    def expect(at: int, marks: str) -> str:
        if at >= len(text) or text[at] not in marks:
            found = repr(text[at]) if at < len(text) else "the end of the file"
            raise DataError(
                f"{path} must hold one JSON list of samples: expected one of {marks!r} at line "
                f"{text.count(chr(10), 0, at) + 1}, found {found}. One sample a line (.jsonl) "
                "survives a broken sample."
            )
        return text[at]

    at = skip(1 if text.startswith("\ufeff") else 0)
    expect(at, "[")
    at = skip(at + 1)
    if expect(at, "]{") == "]":
        return np.zeros((0, 3), np.int64)
    while True:
        expect(at, "{")
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is broken JSON: {error}. One sample a line (.jsonl) survives a broken "
                "sample."
            ) from error
        # Characters to bytes piece by piece; the file is read by bytes later.
        byte += len(text[seen:at].encode())
        line += text.count("\n", seen, at)
        size = len(text[at:end].encode())
        index.append((byte, byte + size, line))
        byte, line, seen = byte + size, line + text.count("\n", at, end), end
        at = skip(end)
        if expect(at, ",]") == "]":
            return np.array(index, np.int64)
        at = skip(at + 1)


class RecordSource:
    """All sources behind one index: `source[i]` is a RawRecord, `len(source)` their number.

    Holds byte offsets only (24 bytes a sample), so that it is cheap to send to worker processes.
    """

    def __init__(self, sources: Sequence[SourceConfig]) -> None:
        self._sources = tuple(sources)
        self._index = []
        for source in self._sources:
            path = Path(source.path)
            if not path.is_file():
                raise DataError(f"The data source {source.path} does not exist or is no file.")
            self._index.append(_jsonl_index(path) if path.suffix == ".jsonl" else _json_index(path))
        self._ends = np.cumsum([len(i) for i in self._index])
        if not len(self):
            raise DataError(f"There is no sample in {', '.join(s.path for s in self._sources)}.")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> RawRecord:
        which = int(np.searchsorted(self._ends, index, side="right"))
        source, rows = self._sources[which], self._index[which]
        start, end, line = (int(x) for x in rows[index - int(self._ends[which]) + len(rows)])
        # Opened on every call: an open handle could be shared neither by threads nor by processes.
        with Path(source.path).open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        return RawRecord(data, source.path, line, source.media_root, source.title)


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
    """The path under `root`, by its text: links may lead elsewhere, `..` and absolute paths not."""
    base, given = PurePosixPath(root), PurePosixPath(path)
    parts: list[str] = []
    if given.is_absolute():
        if ".." in given.parts or not given.is_relative_to(base):
            raise SampleError("path_outside_root", f"{path} is not under the root {root}")
        return str(given)
    for part in given.parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            raise SampleError("path_outside_root", f"{path} leads out of the root {root}")
    return str(base.joinpath(*parts))


def _media(raw: Mapping[str, Any], many: str, one: str, root: str) -> tuple[str, ...]:
    value = raw.get(many) if raw.get(many) is not None else raw.get(one)
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(p, str) and p for p in paths):
        raise _bad(f"`{many}` must be a path or a list of paths")
    return tuple(inside_root(p, root) for p in paths)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fps(raw: Mapping[str, Any], clips: int) -> tuple[float, ...]:
    value = raw.get("fps")
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(_number(v) and math.isfinite(v) and v > 0 for v in values):
        raise _bad(f"fps is {value!r}; it must be a positive number, or one a clip")
    if len(values) not in (1, clips):
        raise _bad(f"fps has {len(values)} values for {clips} clips")
    return tuple(float(v) for v in values)


def _id(data: Mapping[str, Any], raw: RawRecord) -> str:
    return str(data["id"]) if data.get("id") is not None else f"{raw.source}:{raw.line}"


def raw_id(raw: RawRecord) -> str:
    """The sample's own id as far as it can be read, else `source:line`."""
    try:
        data = json.loads(raw.data)
    except (ValueError, RecursionError):
        data = {}
    return _id(data if isinstance(data, dict) else {}, raw)


def parse_record(raw: RawRecord) -> Record:
    """Raises SampleError (bad_json, bad_record, unknown_role, unsupported_field, ...)."""
    try:
        data = json.loads(raw.data)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", str(error)) from error
    if not isinstance(data, dict):
        raise _bad(f"a sample must be a JSON object, not {type(data).__name__}")
    if data.get("patch_positions") is not None:
        raise SampleError(
            "unsupported_field",
            "patch_positions (codec canvases) would be read as ordinary pictures",
        )
    videos = _media(data, "videos", "video", raw.root)
    decimals = data.get("timestamp_decimal")
    if decimals is not None and (type(decimals) is not int or decimals not in range(7)):
        raise _bad(f"timestamp_decimal is {decimals!r}; it must be 0 to 6")
    task = data.get("task")
    if task is not None and not isinstance(task, str):
        raise _bad(f"task is {task!r}; it must be text")
    return Record(
        id=_id(data, raw),
        messages=_messages(data),
        images=_media(data, "images", "image", raw.root),
        videos=videos,
        source=raw.source,
        file=raw.file,
        line=raw.line,
        fps=_fps(data, len(videos)),
        timestamp_decimal=decimals,
        task=task or "",
    )
