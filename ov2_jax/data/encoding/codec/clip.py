"""A clip to the patches that codec-style selection keeps, in one sequential decode.

The threshold of the groups needs the whole clip's scores before the first block can be chosen, so
the sampled frames wait at canvas size, in the decoder's own 4:2:0 (half of RGB's memory): 768 of
them at 313 600 pixels take 345 MiB. Only frames of which something is kept become RGB.
"""

from collections.abc import Callable
from typing import NamedTuple

import av
import numpy as np
from av.codec.context import Flags2
from av.video.reformatter import Interpolation, VideoReformatter

from ov2_jax.config.codec import CodecConfig
from ov2_jax.core.errors import describe
from ov2_jax.data.encoding.codec.bad import is_bad_frame
from ov2_jax.data.encoding.codec.frames import canvas_size, sample_frames
from ov2_jax.data.encoding.codec.scores import ScoreSource, StreamScores
from ov2_jax.data.encoding.codec.select import (
    Selection,
    TooFewFrames,
    block_scores,
    fewest_groups,
    select_blocks,
)
from ov2_jax.data.encoding.video import DECODER_THREADS, MAX_FRAME_PIXELS, MAX_MISSING_SHARE, Clock
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.media import WHOLE, Media, Section, check_exists

# Only frames that look flat or green at a glance are converted to be judged: brightness that hardly
# varies (limits of bad.py: 6), or both colour differences well below their middle, 128.
_FLAT = 8.0
_GREENISH = 120


class CodecClip(NamedTuple):
    """What the encoder sees of a clip: P patches of C*p*p values, in g windows."""

    patches: np.ndarray  # uint8 [P C*p*p], block order, values by (channel, row, column)
    positions: np.ndarray  # int32 [P 3]: source frame number, patch row, patch column
    windows: np.ndarray  # int32 [g]: patches of each window; one group is one window
    fps: float
    selection: Selection


class _Packets(NamedTuple):
    """What a container says of its frames without decoding them."""

    count: int
    keyframes: list[int]  # frame numbers
    bits: dict[int, int]  # by presentation time
    height: int
    width: int
    fps: float


def read_codec_clip(
    path: Media,
    config: CodecConfig,
    *,
    timeout_s: float,
    scores: ScoreSource | None = None,
    fps: float | None = None,
    section: Section = WHOLE,
    check: Callable[[int, int], None] | None = None,
) -> CodecClip:
    """Reads a clip and keeps what its scores say.

    `scores`: where bit costs come from, by default the clip's own stream. `fps` stands in for the
    container's frame rate. Frames count from the start of `section`. `check` is told the fewest
    groups that the clip can have and a group's patches, before anything is decoded; it may raise
    SampleError. Raises TooFewFrames where uniform frames are the way, and SampleError missing_file,
    bad_video or video_timeout.
    """
    config.check_even_blocks()
    check_exists(path, "clip")
    clock = Clock(path, timeout_s)
    try:
        return _read(path, config, clock, scores or StreamScores(), fps, section, check)
    except (SampleError, TooFewFrames):
        raise
    except Exception as error:  # PyAV maps FFmpeg's errors onto many classes
        clock.check()  # an interrupted read looks like any other broken one
        raise SampleError("bad_video", f"{path}: {describe(error)}") from error


def _read(
    path: Media,
    config: CodecConfig,
    clock: Clock,
    scores: ScoreSource,
    fps: float | None,
    section: Section,
    check: Callable[[int, int], None] | None,
) -> CodecClip:
    packets = _scan(path, clock, fps)
    hw = canvas_size((packets.height, packets.width), config)
    span = section.span(path, packets.count, packets.fps)
    keyframes = [n - span.start for n in packets.keyframes if n in span]
    numbers = sample_frames(len(span), keyframes, config)
    if len(numbers) < config.min_group_frames:
        raise TooFewFrames(f"{path} has {len(numbers)} frames, fewer than a group's.")
    if check is not None:
        patches = config.images_per_group * hw[0] * hw[1] // config.patch**2
        check(fewest_groups(len(numbers), config), patches)
    pictures, seen = _decode(clock, packets, span.start + numbers, span.stop, hw, scores)
    if seen - span.start < (1 - MAX_MISSING_SHARE) * len(span):
        raise SampleError(
            "bad_video", f"only {seen} of {span.stop} frames of {path} could be decoded"
        )
    numbers = numbers[: len(pictures)]  # a few announced frames at the end may be missing
    costs = scores.maps((span.start + numbers).tolist())
    selection = select_blocks(
        block_scores(costs, len(numbers), hw, config), numbers, pictures.bad, hw, config
    )
    clock.check()
    return _cut(selection, pictures, packets.fps, config)


def _scan(path: Media, clock: Clock, fps: float | None) -> _Packets:
    with clock.stream() as stream:
        height, width = stream.height, stream.width
        rate = fps or stream.average_rate or stream.guessed_rate
        order, bits = [], {}
        for packet in clock.packets(stream):
            if packet.size > 0 and not packet.is_discard:
                time = packet.pts if packet.pts is not None else packet.dts
                order.append((len(order) if time is None else time, packet.is_keyframe))
                if packet.pts is not None:
                    bits[packet.pts] = 8 * packet.size
    if not rate or not height or not width:
        raise SampleError(
            "bad_video",
            f"{path} states no frame rate or no size, or its frames have over "
            f"{MAX_FRAME_PIXELS} pixels",
        )
    if not order:
        raise SampleError("bad_video", f"{path} has no frames")
    order.sort(key=lambda entry: entry[0])  # of display
    keyframes = [number for number, (_, key) in enumerate(order) if key]
    return _Packets(len(order), keyframes, bits, height, width, float(rate))


class _Pictures:
    """Sampled frames at canvas size, 4:2:0, in one array.

    Frames that FFmpeg allocates one by one take half as much again: what decoding leaves between
    them on the heap is never given back.
    """

    def __init__(self, count: int, hw: tuple[int, int]) -> None:
        self._height, self._width = hw
        self._pixels = np.empty((count, hw[0] * 3 // 2, hw[1]), np.uint8)
        self._looks: list[tuple[int, int]] = []  # colour space and range
        self._bad: list[bool] = []
        self._shrink, self._to_rgb = VideoReformatter(), VideoReformatter()  # they keep tables

    def __len__(self) -> int:
        return len(self._looks)

    @property
    def bad(self) -> np.ndarray:
        """bool [n]: frames that must not be chosen from."""
        return np.array(self._bad, bool)

    def add(self, frame: av.VideoFrame) -> None:
        small = self._shrink.reformat(
            frame,
            height=self._height,
            width=self._width,
            format="yuv420p",
            interpolation=Interpolation.AREA,
        )
        y, u, v = (
            np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width]
            for p in small.planes
        )
        end = 0
        flat = self._pixels[len(self)].reshape(-1)
        for plane in (y, u, v):
            start, end = end, end + plane.size
            flat[start:end].reshape(plane.shape)[:] = plane
        self._looks.append((int(small.colorspace), int(small.color_range)))
        y, u, v = (plane[::4, ::4] for plane in (y, u, v))
        greenish = np.count_nonzero((u < _GREENISH) & (v < _GREENISH)) > u.size // 5
        suspect = y.std() <= _FLAT or greenish
        self._bad.append(bool(suspect and is_bad_frame(self.rgb(len(self) - 1))))

    def rgb(self, index: int) -> np.ndarray:
        """uint8 [H W 3]"""
        frame = av.VideoFrame.from_ndarray(self._pixels[index], format="yuv420p")
        frame.colorspace, frame.color_range = self._looks[index]
        return self._to_rgb.reformat(frame, format="rgb24").to_ndarray()


def _decode(
    clock: Clock,
    packets: _Packets,
    numbers: np.ndarray,
    stop: int,
    hw: tuple[int, int],
    scores: ScoreSource,
) -> tuple[_Pictures, int]:
    """The sampled frames that exist, and how many frames were seen; `numbers` and `stop` are those
    of the file, so that bit costs and vectors find their frames."""
    wanted = set(numbers.tolist())
    pictures, seen = _Pictures(len(numbers), hw), 0
    with clock.stream() as stream:
        # Threads by slices, not by frames: a frame thread exports the vectors of a B frame that
        # another may still be decoding, so scores would differ from run to run.
        stream.thread_type = "SLICE"
        stream.codec_context.thread_count = DECODER_THREADS
        stream.codec_context.flags2 |= Flags2.export_mvs
        for frame in clock.frames(stream):
            take = seen in wanted
            scores.add(seen, frame, packets.bits.get(frame.pts), take)
            if take:
                pictures.add(frame)
            seen += 1
            if seen == stop:
                break
    return pictures, seen


def _cut(selection: Selection, pictures: _Pictures, fps: float, config: CodecConfig) -> CodecClip:
    """Patches of the chosen blocks, padding dropped."""
    positions = block_order(selection, config)
    kept = positions[:, 0] >= 0
    windows = kept.reshape(len(selection.groups), -1).sum(1).astype(np.int32)
    positions = positions[kept]
    p, b = config.patch, config.block_size
    columns = selection.canvas_hw[1] // p // b
    first = positions[:: b * b]  # the upper left patch of every block
    rows, first_column = first[:, 1] // b, first[:, 2] // b
    patches = np.empty((len(first), b * b, 3 * p * p), np.uint8)
    index = np.searchsorted(selection.frame_ids, first[:, 0])
    order = np.argsort(index, kind="stable")
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))
    for at in np.split(order, starts[1:]):
        grid = pictures.rgb(index[at[0]]).reshape(
            -1, b, p, columns, b, p, 3
        )  # R b p C b p 3, R x C blocks
        chosen = grid[rows[at], :, :, first_column[at]]  # k b p b p 3
        patches[at] = chosen.transpose(0, 1, 3, 5, 2, 4).reshape(len(at), b * b, -1)
    return CodecClip(patches.reshape(len(positions), -1), positions, windows, fps, selection)


def block_order(selection: Selection, config: CodecConfig) -> np.ndarray:
    """int32 [g*images_per_group*S 3]: a selection's positions in the encoder's block order."""
    b = config.block_size
    rows, columns = (side // config.patch // b for side in selection.canvas_hw)
    canvases = selection.positions.reshape(-1, rows, b, columns, b, 3)
    return canvases.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3)


def time_runs(positions: np.ndarray, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """(frame numbers [k], merged tokens [k]) of the runs of consecutive tokens with equal t.

    `positions`: int32 [P 3] in m x m block order. A run may cross canvases; each gets one
    timestamp.
    """
    t = positions[:: merge**2, 0]
    starts = np.flatnonzero(np.diff(t, prepend=-1))
    return t[starts], np.diff(starts, append=len(t))
