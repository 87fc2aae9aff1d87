"""The one record form: a sample as its file has it, and the same sample parsed.

Readers (data/sources/readers) bring rows, and layouts.py puts them into this form: a sample is
`{id, messages: [{role, content}], images, videos}` or LLaVA's
`{id, conversations: [{from: human|gpt|system, value}], image, video}`; `<image>` and `<video>` in a
question mark places. Optional: `fps` (of the clips, for their times in seconds),
`timestamp_decimal`, `task` (kept for evaluation), and the fields of media_fields.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.media import Media, MediaValue, Section


class RawRecord(NamedTuple):
    """One sample as its file has it: JSON text, a row, or the reason why it cannot be read."""

    data: bytes | Mapping[str, Any] | SampleError
    file: str
    line: int  # or row, counted from 1
    root: str
    source: str
    video_input: str = "uniform"  # one of VIDEO_INPUTS


class Canvases(NamedTuple):
    """A clip that was made into pictures beforehand, with the files of its patches' positions."""

    images: tuple[MediaValue, ...]
    positions: tuple[MediaValue, ...]  # one for all pictures, or one a picture


class ClipPart(NamedTuple):
    """A clip of which only a section counts."""

    clip: Media
    section: Section


class Record(NamedTuple):
    """A parsed sample. Media are paths inside the root, or bytes; nothing is decoded yet."""

    id: str
    messages: tuple[Mapping[str, str], ...]  # {"role": user|assistant|system, "content": text}
    images: tuple[MediaValue, ...]
    videos: tuple[Media | Canvases | ClipPart, ...]
    source: str
    file: str
    line: int
    video_input: str = "uniform"  # one of VIDEO_INPUTS
    fps: tuple[float, ...] = ()  # none, one for all clips, or one a clip
    bit_costs: tuple[Media, ...] = ()  # none, or one a clip: .npz files, see codec/scores.py
    timestamp_decimal: int | None = None
    task: str = ""
