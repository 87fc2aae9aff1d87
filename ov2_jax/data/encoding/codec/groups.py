"""Where the groups of a clip's sampled frames end.

Sums are float32 in the order of the released tool: if costs are alike, the last bit decides where a
group ends.
"""

import numpy as np
from jaxtyping import Float32, Int64

from ov2_jax.config.codec import CodecConfig
from ov2_jax.data.encoding.codec.block_scores import EPS

_MIN_SPAN = 4  # sampled frames; shorter spans tell nothing about an average group


def fewest_groups(sampled: int, config: CodecConfig) -> int:
    """The fewest groups that a clip of `sampled` sampled frames can have, under max_canvases."""
    whole = sampled - (config.min_group_frames - 1)  # a shorter tail is dropped
    groups = max(1, -(-whole // config.max_group_frames))
    if config.max_canvases is None:
        return groups
    return min(groups, config.max_canvases // config.images_per_group)


def ready_threshold(scores: Float32[np.ndarray, "sampled blocks"], config: CodecConfig) -> float:
    """The score that makes a group ready; 0 if all spans are too short.

    Of every span of group_size sampled frames the highest scores are summed, one for each block of
    all canvases but the first; the threshold is the mean of the sums. Each span's first frame is
    left out, because it would be the anchor.
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


def group_frames(
    scores: Float32[np.ndarray, "sampled blocks"], threshold: float, config: CodecConfig
) -> Int64[np.ndarray, "g 2"]:
    """First and one past the last sampled frame of each group.

    Frames at the end that are fewer than min_group_frames are left out.
    """
    groups, start = [], 0
    while len(scores) - start >= config.min_group_frames:
        end = _group_end(scores[start : start + config.max_group_frames], threshold, config)
        groups.append((start, start + end))
        start += end
    return np.array(groups, np.int64).reshape(-1, 2)


class _Best:
    """The `budget` highest scores among frames that are added one after the other.

    Ties go to the earlier frame, then to raster order, because the sort is stable.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._scores = np.zeros(0, np.float32)  # in order of coming while all fit, then descending
        self.frames = np.zeros(0, np.int64)

    def add(self, frame: int, scores: Float32[np.ndarray, " blocks"]) -> None:
        self._scores = np.concatenate([self._scores, scores])
        self.frames = np.concatenate([self.frames, np.full(len(scores), frame)])
        if len(self._scores) > self._budget:
            order = np.argsort(-self._scores, kind="stable")[: self._budget]
            self._scores, self.frames = self._scores[order], self.frames[order]

    @property
    def sum(self) -> float:
        return float(self._scores.sum())


def _group_end(
    scores: Float32[np.ndarray, "sampled blocks"], threshold: float, config: CodecConfig
) -> int:
    """The number of frames of the group that starts with the first of `scores`.

    The longest length that is worth the threshold and spread over time, but no longer than the
    first such length at which one more frame gained less than readiness_delta_ratio. If no length
    is, all frames of `scores`, at most max_group_frames.
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
                gain = (total - before) / max(abs(before), EPS)
                if gain < config.readiness_delta_ratio:
                    break
        before = total
    return len(scores) if chosen is None else chosen


def _covered(frames: Int64[np.ndarray, " blocks"], length: int, config: CodecConfig) -> int:
    """The number of a group's spans of time that have one of the chosen blocks' frames."""
    bins = config.readiness_coverage_bins
    edges = np.linspace(1, max(2, length), bins + 1).astype(np.int64)
    low, high = edges[:-1], np.maximum(edges[1:], edges[:-1] + 1)
    frames = np.unique(frames)
    inside = (low <= frames[:, None]) & (frames[:, None] < high)  # frames bins
    return len(np.unique(inside.argmax(1)[inside.any(1)]))
