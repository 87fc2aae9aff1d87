"""Clips as uniform frames, decoded one after the other with PyAV.

Sequential decoding gives the true frame numbers, which the model sees as t; seeking does not, in
variable-frame-rate and badly cut files. A frame's time is its number / the average frame rate. As
for pictures, a rotation in the metadata is not applied.
"""

import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

import av
import numpy as np
from PIL import Image

from ov2_jax.data.errors import SampleError
from ov2_jax.data.images import resize
from ov2_jax.data.media import Media, decodable, exists

# A container may announce a few frames more than decode (cut at a non-key frame). More missing than
# this share is a truncated file.
MAX_MISSING_SHARE = 0.05
DECODER_THREADS = 2  # more would fight over cores with the other workers


T = TypeVar("T")


class Clip(NamedTuple):
    """Decoded frames, their numbers in the source video (the t that the model sees), seconds."""

    frames: tuple[Image.Image | np.ndarray, ...]  # arrays are uint8 [H W 3]
    frame_numbers: tuple[int, ...]
    seconds: tuple[float, ...]


class Sampling(NamedTuple):
    """Which frames to take; see DataConfig."""

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


def select_frames(available: int, wanted: int) -> list[int]:
    """Uniform frame numbers from first to last, as torch.linspace(...).round() gives them.

    torch works in float32 with fused multiply-add, forward from the start and, from the middle on,
    back from the end; its round, like numpy's, sends halves to the even neighbour.
    """
    if available <= wanted:
        return list(range(available))
    if wanted == 1:
        return [0]
    i = np.arange(wanted)
    end, step = float(available - 1), float(np.float32(available - 1) / np.float32(wanted - 1))
    exact = np.where(i < wanted // 2, step * i, end - step * (wanted - 1 - i))
    return np.rint(exact.astype(np.float32)).astype(np.int64).tolist()


class Clock:
    """Raises SampleError video_timeout once the time is up; asked between packets, as no signal
    reaches a worker's thread."""

    def __init__(self, path: Media, limit_s: float) -> None:
        self._path, self._limit, self._end = path, limit_s, time.monotonic() + limit_s

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise SampleError(
                "video_timeout", f"{self._path} took longer than {self._limit:g} s to decode"
            )

    def open(self) -> av.container.InputContainer:
        self.check()
        left = max(self._end - time.monotonic(), 0.001)
        return av.open(decodable(self._path), timeout=(left, left))


def _count_frames(clock: Clock) -> int:
    """Frames by counting packets, for containers that do not say (WebM, Matroska, ...)."""
    with clock.open() as container:
        count = 0
        for packet in container.demux(video=0):
            clock.check()
            count += packet.size > 0 and not packet.is_discard
    return count


def _decode(
    clock: Clock, numbers: Sequence[int], size: tuple[int, int]
) -> tuple[list[np.ndarray], int]:
    """The frames of the given ascending numbers that exist, and how many frames were seen.

    Frames are resized as they come: 384 of them at 1080p would take 2.4 GB.
    """
    frames, seen = [], 0
    with clock.open() as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = DECODER_THREADS
        for packet in container.demux(stream):
            clock.check()
            for frame in packet.decode():
                if seen == numbers[len(frames)]:
                    frames.append(resize(frame.to_image(), *size))
                seen += 1
                if len(frames) == len(numbers):
                    return frames, seen
    return frames, seen


def read_clip(
    path: Media,
    sampling: Sampling,
    *,
    timeout_s: float,
    target_size: Callable[[int, int, int], tuple[int, int]],
    fps: float | None = None,
) -> Clip:
    """Reads a clip's uniform frames as RGB.

    `target_size` gets the number of frames and their height and width, and returns the height and
    width that they are resized to. It may raise SampleError: refusing a clip that cannot fit is
    much cheaper than decoding it. `fps` stands in for the container's average frame rate. Raises
    SampleError missing_file, bad_video or video_timeout.
    """
    return _guarded(path, timeout_s, lambda clock: _read(path, sampling, clock, fps, target_size))


class ClipHeader(NamedTuple):
    """What a container says of a clip; nothing was decoded for it."""

    available: int  # frames
    height: int
    width: int
    fps: float
    numbers: tuple[int, ...]  # the frames to take

    @property
    def seconds(self) -> tuple[float, ...]:
        return tuple(n / self.fps for n in self.numbers)


def read_header(
    path: Media, sampling: Sampling, *, timeout_s: float, fps: float | None = None
) -> ClipHeader:
    """Which uniform frames `read_clip` takes, if all frames decode. Raises what it raises."""
    return _guarded(path, timeout_s, lambda clock: _header(path, sampling, clock, fps))


def _guarded(path: Media, timeout_s: float, read: Callable[[Clock], T]) -> T:
    if not exists(path):
        raise SampleError("missing_file", f"there is no clip {path}")
    clock = Clock(path, timeout_s)
    try:
        return read(clock)
    except SampleError:
        raise
    except Exception as error:  # PyAV maps FFmpeg's errors onto many classes
        clock.check()  # an interrupted read looks like any other broken one
        raise SampleError("bad_video", f"{path}: {type(error).__name__}: {error}") from error


def _header(path: Media, sampling: Sampling, clock: Clock, fps: float | None) -> ClipHeader:
    with clock.open() as container:
        if not container.streams.video:
            raise SampleError("bad_video", f"{path} has no video stream")
        stream = container.streams.video[0]
        height, width, announced = stream.height, stream.width, stream.frames
        rate: float | Fraction | None = fps or stream.average_rate or stream.guessed_rate
    if not rate or not height or not width:
        raise SampleError("bad_video", f"{path} states no frame rate or no size")
    available = announced or _count_frames(clock)
    if not available:
        raise SampleError("bad_video", f"{path} has no frames")

    numbers = _choose(sampling, available, float(rate))
    return ClipHeader(available, height, width, float(rate), numbers)


def _choose(sampling: Sampling, available: int, fps: float) -> tuple[int, ...]:
    return tuple(select_frames(available, sampling.count(available / fps)))


def _read(
    path: Media,
    sampling: Sampling,
    clock: Clock,
    fps: float | None,
    target_size: Callable[[int, int, int], tuple[int, int]],
) -> Clip:
    header = _header(path, sampling, clock, fps)
    size = target_size(len(header.numbers), header.height, header.width)
    frames, seen = _decode(clock, header.numbers, size)
    if len(frames) < len(header.numbers):
        if not seen or seen < (1 - MAX_MISSING_SHARE) * header.available:
            raise SampleError(
                "bad_video", f"only {seen} of {header.available} frames of {path} could be decoded"
            )
        header = header._replace(numbers=_choose(sampling, seen, header.fps))
        frames, _ = _decode(clock, header.numbers, size)
        if len(frames) < len(header.numbers):
            raise SampleError("bad_video", f"{path} decodes differently every time")
    return Clip(tuple(frames), header.numbers, header.seconds)
