"""Clips as uniform frames, decoded one after the other with PyAV.

Sequential decoding gives the true frame numbers, which the model sees as t; seeking does not, in
variable-frame-rate and badly cut files. A frame's time is its number / the average frame rate. As
for pictures, a rotation in the metadata is not applied.
"""

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import NamedTuple, TypeVar

import av
import numpy as np
from PIL import Image

from ov2_jax.core.errors import describe
from ov2_jax.core.files import open_binary
from ov2_jax.data.encoding.images import resize
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.media import WHOLE, Media, Section, check_exists, decodable

# A container may announce a few frames more than decode (cut at a non-key frame). More missing than
# this share is a truncated file.
MAX_MISSING_SHARE = 0.05
DECODER_THREADS = 2  # more would fight over cores with the other workers
# An 8K frame. A file of some kilobytes can hold frames of any size, and a decoder keeps up to 17 of
# them, so FFmpeg is told the limit too: sizes can change in mid-stream.
MAX_FRAME_PIXELS = 8192 * 4352
# Containers that hold all of their data. Playlists and lists of files (HLS, DASH, concat, SDP, ...)
# would have FFmpeg open other files, or wait for the network.
_CONTAINERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "gif", "apng"),
    *("mxf", "nut", "rm", "dv", "wtv", "ivf", "obu", "av1", "h264", "hevc", "m4v", "mjpeg", "vc1"),
    *("yuv4mpegpipe", "swf", "nsv", "gxf", "h263", "mj2"),
)
_OPTIONS = {"max_pixels": str(MAX_FRAME_PIXELS), "format_whitelist": ",".join(_CONTAINERS)}


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

    def _open(self) -> av.container.InputContainer:
        self.check()
        left = max(self._end - time.monotonic(), 0.001)
        file = decodable(self._path)
        if isinstance(file, str):
            file = f"file:{file}"  # else FFmpeg takes what is before a colon for a protocol
        try:
            return av.open(file, timeout=(left, left), options=_OPTIONS)
        except (av.error.InvalidDataError, av.error.ArgumentError) as error:
            raise SampleError(
                "bad_video",
                f"{self._path} is no clip in a container such as MP4, Matroska or AVI, or its "
                f"header is damaged: {error}",
            ) from error

    @contextmanager
    def stream(self) -> Iterator[av.VideoStream]:
        """The clip's first video stream, closed when done. Raises SampleError bad_video."""
        with self._open() as container:
            if not container.streams.video:
                raise SampleError("bad_video", f"{self._path} has no video stream")
            stream = container.streams.video[0]
            if stream.height * stream.width > MAX_FRAME_PIXELS:
                raise SampleError(
                    "bad_video",
                    f"{self._path} has frames of {stream.width}x{stream.height} pixels; at most "
                    f"{MAX_FRAME_PIXELS} are decoded",
                )
            stream.codec_context.options = {"max_pixels": _OPTIONS["max_pixels"]}
            yield stream

    def packets(self, stream: av.VideoStream) -> Iterator[av.Packet]:
        for packet in stream.container.demux(stream):
            self.check()
            yield packet

    def frames(self, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
        """Frames in order, up to the first that the decoder had to mend: it spoils what refers to
        it, so the clip counts as cut off there."""
        for packet in self.packets(stream):
            for frame in packet.decode():
                if frame.is_corrupt:
                    return
                yield frame

    def count_frames(self, stream: av.VideoStream) -> int:
        """What an MP4's index says, else by counting packets: other containers do not say, or only
        in a header field that nothing depends on; and a fragmented MP4's index has its first part
        alone."""
        if "mp4" in stream.container.format.name and stream.frames and not self._has_fragments():
            return stream.frames
        return sum(p.size > 0 and not p.is_discard for p in self.packets(stream))

    def _has_fragments(self) -> bool:
        """Whether an MP4 has a `moof` box beside its `moov`."""
        file, at = decodable(self._path), 0
        with open_binary(file) if isinstance(file, str) else file as opened:
            while True:
                self.check()
                opened.seek(at)
                head = opened.read(16)
                if len(head) < 8:
                    return False
                size, kind = struct.unpack(">I4s", head[:8])
                if kind == b"moof":
                    return True
                if size == 1 and len(head) == 16:
                    (size,) = struct.unpack(">Q", head[8:])
                if size < 8:  # 0: to the end of the file
                    return False
                at += size


def _decode(
    clock: Clock, numbers: Sequence[int], size: tuple[int, int]
) -> tuple[list[np.ndarray], int]:
    """The frames of the given ascending numbers in the file that exist, and how many were seen.

    Frames are resized as they come: 384 of them at 1080p would take 2.4 GB.
    """
    frames, seen = [], 0
    with clock.stream() as stream:
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = DECODER_THREADS
        for frame in clock.frames(stream):
            if seen == numbers[len(frames)]:
                frames.append(resize(frame.to_image(), *size))
            seen += 1
            if len(frames) == len(numbers):
                break
    return frames, seen


def read_clip(
    path: Media,
    sampling: Sampling,
    *,
    timeout_s: float,
    target_size: Callable[[int, int, int], tuple[int, int]],
    fps: float | None = None,
    section: Section = WHOLE,
) -> Clip:
    """Reads a clip's uniform frames as RGB, or those of a section.

    `target_size` gets the number of frames and their height and width, and returns the height and
    width that they are resized to. It may raise SampleError: refusing a clip that cannot fit is
    much cheaper than decoding it. `fps` stands in for the container's average frame rate. Raises
    SampleError missing_file, bad_video or video_timeout.
    """
    return _guarded(
        path,
        timeout_s,
        lambda clock: _read(path, _Wanted(sampling, fps, section), clock, target_size),
    )


class _Wanted(NamedTuple):
    sampling: Sampling
    fps: float | None
    section: Section

    def numbers(self, frames: int, fps: float) -> tuple[int, ...]:
        """Of that many frames of a clip or section, those to take."""
        return tuple(select_frames(frames, self.sampling.count(frames / fps)))


class ClipHeader(NamedTuple):
    """What a container says of a clip; nothing was decoded for it."""

    span: range  # numbers in the file of the frames that there are to choose from
    height: int
    width: int
    fps: float
    numbers: tuple[int, ...]  # the frames to take, counted from the first of `span`

    @property
    def seconds(self) -> tuple[float, ...]:
        return tuple(n / self.fps for n in self.numbers)


def read_header(
    path: Media,
    sampling: Sampling,
    *,
    timeout_s: float,
    fps: float | None = None,
    section: Section = WHOLE,
) -> ClipHeader:
    """Which uniform frames `read_clip` takes, if all frames decode. Raises what it raises."""
    wanted = _Wanted(sampling, fps, section)
    return _guarded(path, timeout_s, lambda clock: _header(path, wanted, clock))


def _guarded(path: Media, timeout_s: float, read: Callable[[Clock], T]) -> T:
    check_exists(path, "clip")
    clock = Clock(path, timeout_s)
    try:
        return read(clock)
    except SampleError:
        raise
    except Exception as error:  # PyAV maps FFmpeg's errors onto many classes
        clock.check()  # an interrupted read looks like any other broken one
        raise SampleError("bad_video", f"{path}: {describe(error)}") from error


def _header(path: Media, wanted: _Wanted, clock: Clock) -> ClipHeader:
    with clock.stream() as stream:
        height, width = stream.height, stream.width
        rate: float | Fraction | None = wanted.fps or stream.average_rate or stream.guessed_rate
        if not rate or not height or not width:
            raise SampleError(
                "bad_video",
                f"{path} states no frame rate or no size, or its frames have over "
                f"{MAX_FRAME_PIXELS} pixels",
            )
        available = clock.count_frames(stream)
    if not available:
        raise SampleError("bad_video", f"{path} has no frames")
    span = wanted.section.span(path, available, float(rate))
    numbers = wanted.numbers(len(span), float(rate))
    return ClipHeader(span, height, width, float(rate), numbers)


def _read(
    path: Media,
    wanted: _Wanted,
    clock: Clock,
    target_size: Callable[[int, int, int], tuple[int, int]],
) -> Clip:
    header = _header(path, wanted, clock)
    size = target_size(len(header.numbers), header.height, header.width)
    first = header.span.start
    frames, seen = _decode(clock, [first + n for n in header.numbers], size)
    if len(frames) < len(header.numbers):
        found = max(0, seen - first)
        if not found or found < (1 - MAX_MISSING_SHARE) * len(header.span):
            raise SampleError(
                "bad_video",
                f"only {seen} of {header.span.stop} frames of {path} could be decoded",
            )
        header = header._replace(numbers=wanted.numbers(found, header.fps))
        frames, _ = _decode(clock, [first + n for n in header.numbers], size)
        if len(frames) < len(header.numbers):
            raise SampleError("bad_video", f"{path} decodes differently every time")
    return Clip(tuple(frames), header.numbers, header.seconds)
