"""Blocks worth keeping, from the bits that a clip's frames cost: the released tool's selection.

Letters: N frames of the clip, n sampled frames, r c rows and columns of the bit-cost grid, H W
pixels of a canvas, B its blocks, S its patches, g groups, K blocks kept beside a group's anchor.

Scores are float32 and summed in the order in which the tool sums them: which blocks win, and where
groups end, hangs on the last bit where costs are alike.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ov2_jax.config.codec import CodecConfig
from ov2_jax.data.encoding.codec.frames import canvas_size, frame_numbers, sample_frames

_PERCENTILE = 99
_EPS = 1e-6
_MIN_SPAN = 4  # sampled frames; shorter spans say nothing about an average group
_CHUNK = 32  # frames scored at a time: bounds the float32 maps in memory


class TooFewFrames(ValueError):
    """The clip is too short for a single group; uniform frames are the way to read it."""


class Selection(NamedTuple):
    """What of a clip the model sees."""

    frame_ids: np.ndarray  # int64 [n]: numbers of the sampled frames in the source, ascending
    groups: np.ndarray  # int64 [g 2]: first and one past the last index into frame_ids
    threshold: float  # block score that makes a group ready
    canvas_hw: tuple[int, int]  # pixels
    # int32 [g*images_per_group*S 3]: source frame number, patch row, patch column of every patch,
    # canvas by canvas in raster order; -1 is padding, which fills whole canvases at a group's end.
    positions: np.ndarray


def fewest_groups(sampled: int, config: CodecConfig) -> int:
    """Groups that a clip of so many sampled frames has at least; max_canvases counts."""
    whole = sampled - (config.min_group_frames - 1)  # a shorter tail is dropped
    groups = max(1, -(-whole // config.max_group_frames))
    if config.max_canvases is None:
        return groups
    return min(groups, config.max_canvases // config.images_per_group)


def select_patches(
    bit_cost: np.ndarray,
    keyframes: Sequence[int],
    *,
    num_frames: int,
    fps: float,
    orig_hw: tuple[int, int],
    config: CodecConfig,
    bad_frames: Sequence[int] | np.ndarray | None = None,
) -> Selection:
    """The whole selection for a clip whose bit costs are known.

    `bit_cost` [N r c]: bits of each cell of the coding grid (macroblocks, or coding tree units;
    extra columns count as the tool counts them). `keyframes`: frame numbers. `fps`: frames a
    second; the selection counts frames, so it only has to be positive. `orig_hw`: height and width
    of the source in pixels. `bad_frames`: frame numbers (or a bool mask [N]) that must not be
    chosen, see bad.py. Raises TooFewFrames if the clip has no group, ValueError for inputs that
    contradict each other.
    """
    bit_cost = np.asarray(bit_cost)
    if bit_cost.ndim != 3 or len(bit_cost) != num_frames or 0 in bit_cost.shape:
        raise ValueError(
            f"bit_cost has shape {bit_cost.shape}; it must be [frames rows columns] with "
            f"{num_frames} frames, as num_frames says."
        )
    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be a positive number of frames a second.")
    frame_ids = sample_frames(num_frames, keyframes, config)
    bad = np.zeros(num_frames, bool)
    if bad_frames is not None:
        mask = np.asarray(bad_frames)
        if mask.dtype == bool and mask.shape == bad.shape:
            bad = mask
        else:
            numbers = frame_numbers(bad_frames, "bad_frames")
            if numbers.size and numbers.max() >= num_frames:
                raise ValueError(
                    f"bad_frames has frame {numbers.max()}, but the clip only {num_frames} frames."
                )
            bad[numbers] = True
    hw = canvas_size(orig_hw, config)
    scores = block_scores((bit_cost[i] for i in frame_ids), len(frame_ids), hw, config)
    return select_blocks(scores, frame_ids, bad[frame_ids], hw, config)


def block_scores(
    bit_cost: Iterable[np.ndarray], count: int, hw: tuple[int, int], config: CodecConfig
) -> np.ndarray:
    """float32 [n B]: what each block of each of `count` frames is worth, blocks in raster order.

    `bit_cost` yields the frames' maps [r c]. A map is put on a logarithmic scale, divided by its
    99th percentile, clipped to 1, enlarged to the canvas by nearest neighbour, and summed over
    patches, then over blocks.
    """
    p, b = config.patch, config.block_size
    rows, columns = hw[0] // p, hw[1] // p
    scores = np.empty((count, rows // b * (columns // b)), np.float32)
    maps, done = [], 0
    for number, cost in enumerate(bit_cost, 1):
        maps.append(_normalised(cost))
        if len(maps) < _CHUNK and number < count:
            continue
        stack = np.stack(maps)
        n, r, c = stack.shape
        # A patch's sum is the sum over its pixel rows of the sums along them, and many of those
        # rows are copies of one row of cells: sum along a row of cells once, then down the rows.
        # take, unlike an index, returns rows that lie in memory as rows; numpy's order of summation
        # follows memory, and another order changes last bits.
        wide = np.take(stack, _nearest(c, hw[1]), 2).reshape(n, r, columns, p).sum(-1)
        tall = np.take(wide, _nearest(r, hw[0]), 1).reshape(n, rows, p, columns).sum(2)
        blocks = tall.reshape(n, rows // b, b, columns // b, b).sum((2, 4))
        scores[done:number] = blocks.reshape(n, -1)
        maps, done = [], number
    return scores


def _normalised(cost: np.ndarray) -> np.ndarray:
    """float32 [r c] in 0..1."""
    log = np.log1p(np.maximum(np.asarray(cost, np.float32), 0))
    scale = max(float(np.percentile(log, _PERCENTILE)), _EPS)
    return np.clip(log / np.float32(scale), 0, 1)


def _nearest(size_in: int, size_out: int) -> np.ndarray:
    """int64 [size_out]: the cells that pixels are copied from, rounded as OpenCV's resize does.

    The product with the inverse scale falls short of a whole number here and there, where exact
    arithmetic would not: 40 rows to 392 differ in six places.
    """
    cells = np.floor(np.arange(size_out) * (1 / (size_out / size_in))).astype(np.int64)
    return np.minimum(cells, size_in - 1)


# --- groups ---------------------------------------------------------------------------------------


class _Best:
    """The K highest scores among frames that are added one after the other.

    Ties go to the earlier frame, then to raster order, which a stable sort gives for free.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._seen = np.zeros(0, np.float32)  # in order of coming while all fit, then descending
        self.frames = np.zeros(0, np.int64)

    def add(self, frame: int, scores: np.ndarray) -> None:
        self._seen = np.concatenate([self._seen, scores])
        self.frames = np.concatenate([self.frames, np.full(len(scores), frame)])
        if len(self._seen) > self._budget:
            order = np.argsort(-self._seen, kind="stable")[: self._budget]
            self._seen, self.frames = self._seen[order], self.frames[order]

    @property
    def sum(self) -> float:
        return float(self._seen.sum())


def ready_threshold(scores: np.ndarray, config: CodecConfig) -> float:
    """The K-sum of an average span of group_size sampled frames; 0 if all spans are too short.

    `scores`: float32 [n B]. Each span's first frame is left out: it would be the anchor.
    """
    shortest = max(_MIN_SPAN, config.readiness_coverage_bins + 1)
    budget = (config.images_per_group - 1) * scores.shape[1]
    sums = []
    for start in range(0, len(scores), config.group_size):
        span = scores[start : start + config.group_size]
        if len(span) >= shortest:
            flat = span[1:].reshape(-1)
            if len(flat) > budget:
                flat = np.sort(np.partition(flat, len(flat) - budget)[len(flat) - budget :])[::-1]
                flat = np.ascontiguousarray(flat)
            sums.append(float(flat.sum()))
    return float(np.mean(np.array(sums, np.float64))) if sums else 0.0


def group_frames(scores: np.ndarray, threshold: float, config: CodecConfig) -> np.ndarray:
    """int64 [g 2]: first and one past the last sampled frame of each group.

    `scores`: float32 [n B]. Frames at the end that are fewer than min_group_frames are left out.
    """
    groups, start = [], 0
    while len(scores) - start >= config.min_group_frames:
        end = _group_end(scores[start : start + config.max_group_frames], threshold, config)
        groups.append((start, start + end))
        start += end
    return np.array(groups, np.int64).reshape(-1, 2)


def _group_end(scores: np.ndarray, threshold: float, config: CodecConfig) -> int:
    """Frames of the group that starts with the first of `scores` [at most max_group_frames, B].

    The longest length that is worth the threshold and spread over time, but no longer than the
    first such length at which one more frame gained less than readiness_delta_ratio; all frames if
    no length is.
    """
    best = _Best((config.images_per_group - 1) * scores.shape[1])
    bins = min(config.readiness_coverage_bins, config.images_per_group - 1)
    chosen, before = None, None
    for length in range(2, len(scores) + 1):
        best.add(length - 1, scores[length - 1])
        if length < config.min_group_frames:
            continue
        total = best.sum
        if total >= threshold and _covered(best.frames, length, config) >= bins:
            chosen = length
            if before is not None:
                gain = (total - before) / max(abs(before), _EPS)
                if gain < config.readiness_delta_ratio:
                    break
        before = total
    return len(scores) if chosen is None else chosen


def _covered(frames: np.ndarray, length: int, config: CodecConfig) -> int:
    """In how many of a group's spans of time the chosen blocks' frames lie."""
    bins = config.readiness_coverage_bins
    edges = np.linspace(1, max(2, length), bins + 1).astype(np.int64)
    low, high = edges[:-1], np.maximum(edges[1:], edges[:-1] + 1)
    frames = np.unique(frames)
    inside = (low <= frames[:, None]) & (frames[:, None] < high)  # frames bins
    return len(np.unique(inside.argmax(1)[inside.any(1)]))


# --- selection ------------------------------------------------------------------------------------


def select_blocks(
    scores: np.ndarray,
    frame_ids: np.ndarray,
    bad: np.ndarray,
    hw: tuple[int, int],
    config: CodecConfig,
) -> Selection:
    """Groups and their blocks from block scores: float32 [n B] for sampled frames [n] of a clip.

    `bad` bool [n]: frames that are not chosen from; a bad anchor changes places with its group's
    first good frame. Raises TooFewFrames.
    """
    if len(frame_ids) < config.min_group_frames:
        raise TooFewFrames(
            f"{len(frame_ids)} sampled frames are fewer than the {config.min_group_frames} of a "
            "group; read such a clip as uniform frames."
        )
    threshold = ready_threshold(scores, config)
    groups = group_frames(scores, threshold, config)
    if config.max_canvases is not None:
        fit = config.max_canvases // config.images_per_group
        if len(groups) > fit:
            groups = groups[np.linspace(0, len(groups) - 1, fit).round().astype(np.int64)]
    positions = [
        _group_positions(scores[s:e], frame_ids[s:e], bad[s:e], hw, config) for s, e in groups
    ]
    return Selection(frame_ids, groups, threshold, hw, np.concatenate(positions))


def _group_positions(
    scores: np.ndarray,
    frame_ids: np.ndarray,
    bad: np.ndarray,
    hw: tuple[int, int],
    config: CodecConfig,
) -> np.ndarray:
    """int32 [images_per_group*S 3] of one group, canvases in raster order."""
    b = config.block_size
    rows, columns = hw[0] // config.patch // b, hw[1] // config.patch // b  # in blocks
    size = rows * columns
    order = np.arange(len(frame_ids))
    good = np.flatnonzero(~bad)
    if bad[0] and len(good):
        order[[0, good[0]]] = order[[good[0], 0]]
    candidates = order[1:][~bad[order[1:]]]
    flat = scores[candidates].reshape(-1)
    kept = np.argsort(-flat, kind="stable")[: (config.images_per_group - 1) * size]
    frames = np.concatenate([np.repeat(order[:1], size), candidates[kept // size]])
    blocks = np.concatenate([np.arange(size), kept % size])
    rest = np.lexsort((blocks[size:], frame_ids[frames[size:]])) + size
    in_order = np.concatenate([np.arange(size), rest])
    frames, blocks = frames[in_order], blocks[in_order]

    positions = np.full((config.images_per_group * size, b, b, 3), -1, np.int32)
    top = np.arange(b)
    filled = positions[: len(blocks)]
    filled[..., 0] = frame_ids[frames][:, None, None]
    filled[..., 1] = (blocks // columns * b)[:, None, None] + top[:, None]
    filled[..., 2] = (blocks % columns * b)[:, None, None] + top
    canvases = positions.reshape(config.images_per_group, rows, columns, b, b, 3)
    return canvases.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3)
