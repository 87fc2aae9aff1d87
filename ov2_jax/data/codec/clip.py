"""A clip to the patches that codec-style selection keeps, in one sequential decode.

The threshold of the groups needs the whole clip's scores before the first block can be chosen, so
the sampled frames wait at canvas size, in the decoder's own 4:2:0 (half of RGB's memory): 768 of
them at 313 600 pixels take 361 MB. Only frames of which something is kept become RGB.
"""

from typing import NamedTuple

import av
import numpy as np
from av.codec.context import Flags2
from av.video.reformatter import Interpolation, VideoReformatter

from ov2_jax.data.codec.bad import is_bad_frame
from ov2_jax.data.codec.config import CodecConfig
from ov2_jax.data.codec.frames import canvas_size, sample_frames
from ov2_jax.data.codec.scores import ScoreSource, StreamScores
from ov2_jax.data.codec.select import Selection, TooFewFrames, block_scores, select_blocks
from ov2_jax.data.errors import SampleError
from ov2_jax.data.video import _DECODER_THREADS, MAX_MISSING_SHARE, _Clock

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
    selection: Selection | None  # None where canvases came ready made


class _Packets(NamedTuple):
    """What a container says of its frames without decoding them."""

    count: int
    keyframes: list[int]  # frame numbers
    bits: dict[int, int]  # by presentation time
    height: int
    width: int
    fps: float


def read_codec_clip(
    path: str,
    config: CodecConfig,
    *,
    timeout_s: float,
    scores: ScoreSource | None = None,
    fps: float | None = None,
) -> CodecClip:
    """Reads a clip and keeps what its scores say.

    `scores`: where bit costs come from, by default the clip's own stream. `fps` stands in for the
    container's frame rate. Raises TooFewFrames where uniform frames are the way, and SampleError
    missing_file, bad_video or video_timeout.
    """
    clock = _Clock(path, timeout_s)
    try:
        return _read(path, config, clock, scores or StreamScores(), fps)
    except (SampleError, TooFewFrames):
        raise
    except FileNotFoundError as error:
        raise SampleError("missing_file", f"there is no clip {path}") from error
    except Exception as error:  # PyAV maps FFmpeg's errors onto many classes
        clock.check()  # an interrupted read looks like any other broken one
        raise SampleError("bad_video", f"{path}: {type(error).__name__}: {error}") from error


def _read(
    path: str,
    config: CodecConfig,
    clock: _Clock,
    scores: ScoreSource,
    fps: float | None,
) -> CodecClip:
    packets = _scan(path, clock, fps)
    hw = canvas_size((packets.height, packets.width), config)
    numbers = sample_frames(packets.count, packets.keyframes, config)
    if len(numbers) < config.min_group_frames:
        raise TooFewFrames(f"{path} has {len(numbers)} frames, fewer than a group's.")
    frames, seen = _decode(clock, packets, numbers, hw, scores)
    if seen < (1 - MAX_MISSING_SHARE) * packets.count:
        raise SampleError(
            "bad_video", f"only {seen} of {packets.count} frames of {path} could be decoded"
        )
    numbers = numbers[: len(frames)]  # a few announced frames at the end may be missing
    bad = np.array([_is_bad(frame) for frame in frames], bool)
    costs = scores.maps(numbers.tolist())
    selection = select_blocks(
        block_scores(costs, len(numbers), hw, config), numbers, bad, hw, config
    )
    clock.check()
    return _cut(selection, frames, packets.fps, config)


def _scan(path: str, clock: _Clock, fps: float | None) -> _Packets:
    with clock.open() as container:
        if not container.streams.video:
            raise SampleError("bad_video", f"{path} has no video stream")
        stream = container.streams.video[0]
        height, width = stream.height, stream.width
        rate = fps or stream.average_rate or stream.guessed_rate
        order, bits = [], {}
        for packet in container.demux(stream):
            clock.check()
            if packet.size > 0 and not packet.is_discard:
                time = packet.pts if packet.pts is not None else packet.dts
                order.append((len(order) if time is None else time, packet.is_keyframe))
                if packet.pts is not None:
                    bits[packet.pts] = 8 * packet.size
    if not rate or not height or not width:
        raise SampleError("bad_video", f"{path} states no frame rate or no size")
    if not order:
        raise SampleError("bad_video", f"{path} has no frames")
    order.sort(key=lambda entry: entry[0])  # of display
    keyframes = [number for number, (_, key) in enumerate(order) if key]
    return _Packets(len(order), keyframes, bits, height, width, float(rate))


def _decode(
    clock: _Clock,
    packets: _Packets,
    numbers: np.ndarray,
    hw: tuple[int, int],
    scores: ScoreSource,
) -> tuple[list[av.VideoFrame], int]:
    """The sampled frames that exist at canvas size, 4:2:0, and how many frames were seen."""
    shrink = VideoReformatter()  # one for all frames: it keeps its filter tables
    wanted = set(numbers.tolist())
    frames, seen = [], 0
    with clock.open() as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = _DECODER_THREADS
        stream.codec_context.flags2 |= Flags2.export_mvs
        for packet in container.demux(stream):
            clock.check()
            for frame in packet.decode():
                take = seen in wanted
                scores.add(seen, frame, packets.bits.get(frame.pts), take)
                if take:
                    frames.append(
                        shrink.reformat(
                            frame,
                            height=hw[0],
                            width=hw[1],
                            format="yuv420p",
                            interpolation=Interpolation.AREA,
                        )
                    )
                seen += 1
    return frames, seen


def _is_bad(frame: av.VideoFrame) -> bool:
    y, u, v = (_thinned(plane) for plane in frame.planes)
    greenish = np.count_nonzero((u < _GREENISH) & (v < _GREENISH)) > u.size // 5
    return bool((y.std() <= _FLAT or greenish) and is_bad_frame(frame.to_ndarray(format="rgb24")))


def _thinned(plane: av.video.plane.VideoPlane) -> np.ndarray:
    """uint8: every fourth sample of every fourth row."""
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return rows[::4, : plane.width : 4]


def _cut(
    selection: Selection, frames: list[av.VideoFrame], fps: float, config: CodecConfig
) -> CodecClip:
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
    to_rgb = VideoReformatter()
    index = np.searchsorted(selection.frame_ids, first[:, 0])
    order = np.argsort(index, kind="stable")
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))
    for at in np.split(order, starts[1:]):
        rgb = to_rgb.reformat(frames[index[at[0]]], format="rgb24").to_ndarray()
        grid = rgb.reshape(-1, b, p, columns, b, p, 3)  # R b p C b p 3, R x C blocks
        chosen = grid[rows[at], :, :, first_column[at]]  # k b p b p 3
        patches[at] = chosen.transpose(0, 1, 3, 5, 2, 4).reshape(len(at), b * b, -1)
    return CodecClip(patches.reshape(len(positions), -1), positions, windows, fps, selection)


def block_order(selection: Selection, config: CodecConfig) -> np.ndarray:
    """int32 [g*images_per_group*S 3]: a selection's positions in the encoder's block order."""
    b = config.block_size
    rows, columns = (side // config.patch // b for side in selection.canvas_hw)
    canvases = selection.positions.reshape(-1, rows, b, columns, b, 3)
    return canvases.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3)


def time_runs(positions: np.ndarray, config: CodecConfig) -> tuple[np.ndarray, np.ndarray]:
    """(frame numbers [k], merged tokens [k]) of the runs of consecutive tokens with equal t.

    `positions`: int32 [P 3] in block order. A run may cross canvases; each gets one timestamp.
    """
    t = positions[:: config.block_size**2, 0]
    starts = np.flatnonzero(np.diff(t, prepend=-1))
    return t[starts], np.diff(starts, append=len(t))
