"""A sample's fields of pictures and clips, as paths inside the source's root or as bytes.

A field has one value or a list: a path relative to the root, `{bytes, path}` with the file's bytes
(the path is then only a name), or, in JSON, `{base64, path}`. `start` and `end` name a section of
the sample's one clip; `fps` replaces what clips' containers state.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ov2_jax.data.rejected import SampleError, bad_record
from ov2_jax.data.sources.media import Embedded, MediaValue, Section

_FPS_RANGE = 1e-6, 1e6
_LATEST = 1e9  # seconds


def inside_root(path: str, root: str) -> str:
    """The path under `root`. Raises SampleError path_outside_root.

    Only the text of the path counts: a link may lead out of the root, `..` and absolute paths may
    not. Both may be remote (`gs://bucket/...`); a path with a scheme counts as absolute.
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


def media_of(row: Mapping[str, Any], many: str, one: str, root: str) -> tuple[MediaValue, ...]:
    """The media of the field `many`, else of `one`. Raises SampleError."""
    value = row.get(many) if row.get(many) is not None else row.get(one)
    values = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(_picture_or_clip(v, f"{many}[{i}]", root) for i, v in enumerate(values))


def _picture_or_clip(value: object, name: str, root: str) -> MediaValue:
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
                raise bad_record(f"{name}.base64 is not base64: {error}") from error
        if isinstance(data, bytes):
            return Embedded(data, f"{name} ({path})" if path else name)
        if data is None and isinstance(path, str) and path:
            return inside_root(path, root)
    raise bad_record(f"{name} must be a path, or an object with `bytes` or a `path`")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def section_of(row: Mapping[str, Any]) -> Section | None:
    """From `start` and `end`, in seconds; None without both. Raises SampleError."""
    start, end = row.get("start"), row.get("end")
    if start is None and end is None:
        return None
    start = 0 if start is None else start
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (_is_number(value) and 0 <= value < _LATEST):
            raise bad_record(f"{name} is {value!r}; it must be a time in seconds")
    if end is not None and end <= start:
        raise bad_record(f"end is {end}; it must be later than start, {start}")
    return Section(float(start), None if end is None else float(end))


def fps_of(row: Mapping[str, Any], clips: int) -> tuple[float, ...]:
    """None, one for all clips, or one a clip. Raises SampleError."""
    value = row.get("fps")
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    low, high = _FPS_RANGE
    if not all(_is_number(v) and low <= v <= high for v in values):
        raise bad_record(
            f"fps is {value!r}; it must be a number from {low:g} to {high:g}, or one a clip"
        )
    if len(values) not in (1, clips):
        raise bad_record(f"fps has {len(values)} values for {clips} clips")
    return tuple(float(v) for v in values)
