"""Clips as uniform frames, decoded one after the other with PyAV.

Sequential decoding gives the true frame numbers, which the model gets as t. Seeking does not, in
files with a variable frame rate and in badly cut ones. A frame's time is its number / the average
frame rate. As for pictures, a rotation in the metadata is not applied.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ov2_jax.data.encoding.clip_reader import (
    DECODER_THREADS,
    MAX_FRAME_PIXELS,
    MAX_MISSING_SHARE,
    ClipReader,
    open_clip,
)
from ov2_jax.data.encoding.images import resize
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.media import WHOLE, Media, Section


class Clip(NamedTuple):
    """Decoded frames, their numbers in the source video (the model's t) and their seconds."""

    frames: tuple[Image.Image | UInt8[np.ndarray, "height width 3"], ...]
    frame_numbers: tuple[int, ...]
    seconds: tuple[float, ...]


class FrameSampling(NamedTuple):
    """How many frames to take; see DataConfig."""

    num_frames: int | None
    target_fps: float | None
    max_frames: int

    def count(self, seconds: float) -> int:
        """Frames to take from a clip of a duration (the reference's rule)."""
        if self.target_fps is not None:
            return min(max(1, int(seconds * self.target_fps)), self.max_frames)
        if self.num_frames is not None:
            return self.num_frames
        return 8 if seconds < 10 else 16 if seconds < 30 else self.max_frames

    def numbers(self, frames: int, fps: float) -> tuple[int, ...]:
        """The frames to take from a clip or section of `frames` frames."""
        return tuple(select_frames(frames, self.count(frames / fps)))


def select_frames(available: int, wanted: int) -> list[int]:
    """Uniform frame numbers from first to last, as torch.linspace(...).round() gives them.

    torch works in float32 with fused multiply-add. In the first half it adds steps to the start, in
    the second half it subtracts them from the end. Its round, like numpy's, sends halves to the
    even neighbour.
    """
    if available <= wanted:
        return list(range(available))
    if wanted == 1:
        return [0]
    i = np.arange(wanted)
    end, step = float(available - 1), float(np.float32(available - 1) / np.float32(wanted - 1))
    exact = np.where(i < wanted // 2, step * i, end - step * (wanted - 1 - i))
    return np.rint(exact.astype(np.float32)).astype(np.int64).tolist()


class ClipHeader(NamedTuple):
    """What a container states about a clip; nothing is decoded for it."""

    span: range  # numbers in the file of the frames to choose from
    height: int
    width: int
    fps: float
    numbers: tuple[int, ...]  # the frames to take, counted from the first of `span`

    @property
    def seconds(self) -> tuple[float, ...]:
        return tuple(n / self.fps for n in self.numbers)


def read_header(
    path: Media,
    sampling: FrameSampling,
    *,
    timeout_s: float,
    fps: float | None = None,
    section: Section = WHOLE,
) -> ClipHeader:
    """The uniform frames that `read_clip` takes if all frames decode. Raises the same errors."""
    with open_clip(path, timeout_s) as reader:
        return _header(reader, sampling, fps, section)


def read_clip(
    path: Media,
    sampling: FrameSampling,
    *,
    timeout_s: float,
    target_size: Callable[[int, int, int], tuple[int, int]],
    fps: float | None = None,
    section: Section = WHOLE,
) -> Clip:
    """Reads the uniform frames of a clip, or of a section of it, as RGB.

    `target_size` gets the number of frames and their height and width, and returns the height and
    width to resize them to. It may raise SampleError: rejecting a clip that cannot fit is much
    cheaper than decoding it. `fps` replaces the container's average frame rate. Raises SampleError
    missing_file, bad_video or video_timeout.
    """
    with open_clip(path, timeout_s) as reader:
        header = _header(reader, sampling, fps, section)
        size = target_size(len(header.numbers), header.height, header.width)
        first = header.span.start
        frames, seen = _decode(reader, [first + n for n in header.numbers], size)
        if len(frames) < len(header.numbers):
            found = max(0, seen - first)
            if not found or found < (1 - MAX_MISSING_SHARE) * len(header.span):
                raise SampleError(
                    "bad_video",
                    f"only {seen} of {header.span.stop} frames of {path} could be decoded",
                )
            header = header._replace(numbers=sampling.numbers(found, header.fps))
            frames, _ = _decode(reader, [first + n for n in header.numbers], size)
            if len(frames) < len(header.numbers):
                raise SampleError("bad_video", f"{path} decodes differently every time")
        return Clip(tuple(frames), header.numbers, header.seconds)


def _header(
    reader: ClipReader, sampling: FrameSampling, fps: float | None, section: Section
) -> ClipHeader:
    path = reader.path
    with reader.stream() as stream:
        height, width = stream.height, stream.width
        rate: float | Fraction | None = fps or stream.average_rate or stream.guessed_rate
        if not rate or not height or not width:
            raise SampleError(
                "bad_video",
                f"{path} states no frame rate or no size, or its frames have over "
                f"{MAX_FRAME_PIXELS} pixels",
            )
        available = reader.count_frames(stream)
    if not available:
        raise SampleError("bad_video", f"{path} has no frames")
    span = section.span(path, available, float(rate))
    numbers = sampling.numbers(len(span), float(rate))
    return ClipHeader(span, height, width, float(rate), numbers)


def _decode(
    reader: ClipReader, numbers: Sequence[int], size: tuple[int, int]
) -> tuple[list[UInt8[np.ndarray, "height width 3"]], int]:
    """The frames that exist of the ascending `numbers` (in the file), and how many were decoded.

    Frames are resized as they come: 384 of them at 1080p would take 2.4 GB.
    """
    frames, seen = [], 0
    with reader.stream() as stream:
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = DECODER_THREADS
        for frame in reader.frames(stream):
            if seen == numbers[len(frames)]:
                frames.append(resize(frame.to_image(), *size))
            seen += 1
            if len(frames) == len(numbers):
                break
    return frames, seen
