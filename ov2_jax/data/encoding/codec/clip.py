"""A clip to the patches that codec-style selection keeps, in one sequential decode.

The threshold of the groups needs the whole clip's scores before the first block can be chosen, so
the sampled frames wait (waiting_frames.py). Only frames with a kept block become RGB.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from av.codec.context import Flags2
from jaxtyping import Int, Int32, Int64, UInt8

from ov2_jax.config.codec import CodecConfig
from ov2_jax.data.encoding.clip_reader import (
    DECODER_THREADS,
    MAX_FRAME_PIXELS,
    MAX_MISSING_SHARE,
    ClipReader,
    open_clip,
)
from ov2_jax.data.encoding.codec.block_scores import block_scores
from ov2_jax.data.encoding.codec.frames import canvas_size, sample_frames
from ov2_jax.data.encoding.codec.groups import fewest_groups
from ov2_jax.data.encoding.codec.scores import ScoreSource, StreamScores
from ov2_jax.data.encoding.codec.select import Selection, TooFewFrames, select_blocks
from ov2_jax.data.encoding.codec.waiting_frames import WaitingFrames
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.media import WHOLE, Media, Section


class CodecClip(NamedTuple):
    """The patches of a clip that the encoder gets, in block order, and their windows."""

    patches: UInt8[np.ndarray, "P values"]  # values by (channel, row, column)
    positions: Int32[np.ndarray, "P 3"]  # source frame number, patch row, patch column
    windows: Int32[np.ndarray, " g"]  # patches of each window; one group is one window
    fps: float
    selection: Selection


class _Packets(NamedTuple):
    """What a container states about its frames; nothing is decoded for it."""

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
    """Reads a clip and keeps the blocks with the highest scores.

    `scores`: the source of its bit costs, by default the clip's own stream. `fps` replaces the
    container's frame rate. Frames count from the start of `section`. `check` gets the fewest groups
    that the clip can have and a group's patches, before anything is decoded; it may raise
    SampleError. Raises TooFewFrames if the clip must be read as uniform frames, and SampleError
    missing_file, bad_video or video_timeout.
    """
    config.check_even_blocks()
    with open_clip(path, timeout_s, passes=TooFewFrames) as reader:
        return _read(reader, config, scores or StreamScores(), fps, section, check)


def _read(
    reader: ClipReader,
    config: CodecConfig,
    scores: ScoreSource,
    fps: float | None,
    section: Section,
    check: Callable[[int, int], None] | None,
) -> CodecClip:
    path = reader.path
    packets = _scan(reader, fps)
    hw = canvas_size((packets.height, packets.width), config)
    span = section.span(path, packets.count, packets.fps)
    keyframes = [n - span.start for n in packets.keyframes if n in span]
    numbers = sample_frames(len(span), keyframes, config)
    if len(numbers) < config.min_group_frames:
        raise TooFewFrames(f"{path} has {len(numbers)} frames, fewer than a group's.")
    if check is not None:
        patches = config.images_per_group * hw[0] * hw[1] // config.patch**2
        check(fewest_groups(len(numbers), config), patches)
    frames, seen = _decode(reader, packets, span.start + numbers, span.stop, hw, scores)
    if seen - span.start < (1 - MAX_MISSING_SHARE) * len(span):
        raise SampleError(
            "bad_video", f"only {seen} of {span.stop} frames of {path} could be decoded"
        )
    numbers = numbers[: len(frames)]  # a few announced frames at the end may be missing
    costs = scores.maps((span.start + numbers).tolist())
    selection = select_blocks(
        block_scores(costs, len(numbers), hw, config), numbers, frames.bad, hw, config
    )
    reader.check_time()
    return _cut(selection, frames, packets.fps, config)


def _scan(reader: ClipReader, fps: float | None) -> _Packets:
    path = reader.path
    with reader.stream() as stream:
        height, width = stream.height, stream.width
        rate = fps or stream.average_rate or stream.guessed_rate
        order, bits = [], {}
        for packet in reader.packets(stream):
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


def _decode(
    reader: ClipReader,
    packets: _Packets,
    numbers: Int64[np.ndarray, " sampled"],
    stop: int,
    hw: tuple[int, int],
    scores: ScoreSource,
) -> tuple[WaitingFrames, int]:
    """The sampled frames that exist, and how many frames were decoded.

    `numbers` and `stop` count in the file, not in a section of it: so bit costs and vectors find
    their frames.
    """
    wanted = set(numbers.tolist())
    frames, seen = WaitingFrames(len(numbers), hw), 0
    with reader.stream() as stream:
        # Threads by slices, not by frames: a frame thread exports the vectors of a B frame that
        # another may still be decoding, so scores would differ from run to run.
        stream.thread_type = "SLICE"
        stream.codec_context.thread_count = DECODER_THREADS
        stream.codec_context.flags2 |= Flags2.export_mvs
        for frame in reader.frames(stream):
            take = seen in wanted
            scores.add(seen, frame, packets.bits.get(frame.pts), take)
            if take:
                frames.add(frame)
            seen += 1
            if seen == stop:
                break
    return frames, seen


def _cut(selection: Selection, frames: WaitingFrames, fps: float, config: CodecConfig) -> CodecClip:
    """The patches of the chosen blocks, without padding."""
    positions = block_order(selection, config)
    kept = positions[:, 0] >= 0
    windows = kept.reshape(len(selection.groups), -1).sum(1).astype(np.int32)
    positions = positions[kept]
    p, m = config.patch, config.block_size
    columns = selection.canvas_hw[1] // p // m  # in blocks
    first = positions[:: m * m]  # the upper left patch of every block
    block_rows, block_columns = first[:, 1] // m, first[:, 2] // m
    patches = np.empty((len(first), m * m, 3 * p * p), np.uint8)
    index = np.searchsorted(selection.frame_ids, first[:, 0])
    order = np.argsort(index, kind="stable")
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))
    for at in np.split(order, starts[1:]):
        # rows m p columns m p 3: rows x columns blocks
        grid = frames.rgb(int(index[at[0]])).reshape(-1, m, p, columns, m, p, 3)
        chosen = grid[block_rows[at], :, :, block_columns[at]]  # blocks m p m p 3
        patches[at] = chosen.transpose(0, 1, 3, 5, 2, 4).reshape(len(at), m * m, -1)
    return CodecClip(patches.reshape(len(positions), -1), positions, windows, fps, selection)


def block_order(selection: Selection, config: CodecConfig) -> Int32[np.ndarray, "P 3"]:
    """A selection's positions in the encoder's block order, padding included."""
    m = config.block_size
    rows, columns = (side // config.patch // m for side in selection.canvas_hw)
    canvases = selection.positions.reshape(-1, rows, m, columns, m, 3)
    return canvases.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3)


def time_runs(
    positions: Int[np.ndarray, "P 3"], merge: int
) -> tuple[Int[np.ndarray, " runs"], Int[np.ndarray, " runs"]]:
    """The frame number, and the merged tokens, of each run of consecutive tokens with equal t.

    `positions` are in m x m block order. A run may cross canvases; it gets one timestamp.
    """
    t = positions[:: merge**2, 0]
    starts = np.flatnonzero(np.diff(t, prepend=-1))
    return t[starts], np.diff(starts, append=len(t))
