"""Blocks worth keeping, from the bits that a clip's frames cost: the released tool's selection.

Scores are float32 and summed in the order of the released tool: if costs are alike, the last bit
decides which blocks win and where groups end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from ov2_jax.config.codec import CodecConfig
from ov2_jax.data.encoding.codec.block_scores import block_scores
from ov2_jax.data.encoding.codec.frames import canvas_size, frame_numbers, sample_frames
from ov2_jax.data.encoding.codec.groups import group_frames, ready_threshold


class TooFewFrames(ValueError):
    """The clip is too short for a single group; it must be read as uniform frames."""


class Selection(NamedTuple):
    """The parts of a clip that the model gets.

    `positions` are source frame number, patch row and patch column of the patches of all canvases
    (images_per_group of each group), canvas by canvas in raster order. -1 is padding, which fills
    whole canvases at a group's end.
    """

    frame_ids: Int64[np.ndarray, " sampled"]  # numbers in the source, ascending
    groups: Int64[np.ndarray, "g 2"]  # first and one past the last index into frame_ids
    threshold: float  # block score that makes a group ready
    canvas_hw: tuple[int, int]  # pixels
    positions: Int32[np.ndarray, "P 3"]


def select_patches(
    bit_cost: np.ndarray,
    keyframes: Sequence[float] | np.ndarray,
    *,
    num_frames: int,
    fps: float,
    orig_hw: tuple[int, int],
    config: CodecConfig,
    bad_frames: Sequence[float] | np.ndarray | None = None,
) -> Selection:
    """The whole selection for a clip whose bit costs are known.

    `bit_cost` [frames r c]: bits of each cell of the coding grid (macroblocks, or coding tree
    units; extra columns count as they do in the tool). `keyframes`: frame numbers. `fps`: frames a
    second; the selection counts frames, so it only has to be positive. `orig_hw`: height and width
    of the source in pixels. `bad_frames`: frame numbers (or a bool mask [frames]) that must not be
    chosen, see bad_frames.py. Raises TooFewFrames if the clip has no group, ValueError for inputs
    that contradict each other.
    """
    bit_cost = np.asarray(bit_cost)
    if bit_cost.ndim != 3 or len(bit_cost) != num_frames or 0 in bit_cost.shape:
        raise ValueError(
            f"bit_cost has shape {bit_cost.shape}; it must be [frames rows columns] with "
            f"{num_frames} frames, as in num_frames."
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


def select_blocks(
    scores: Float32[np.ndarray, "sampled blocks"],
    frame_ids: Int64[np.ndarray, " sampled"],
    bad: Bool[np.ndarray, " sampled"],
    hw: tuple[int, int],
    config: CodecConfig,
) -> Selection:
    """Groups and their blocks from the scores of a clip's sampled frames.

    `bad`: frames that are not chosen from; a bad anchor changes places with its group's first good
    frame. Raises TooFewFrames.
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
    scores: Float32[np.ndarray, "sampled blocks"],
    frame_ids: Int64[np.ndarray, " sampled"],
    bad: Bool[np.ndarray, " sampled"],
    hw: tuple[int, int],
    config: CodecConfig,
) -> Int32[np.ndarray, "P 3"]:
    """The positions of one group's canvases, in raster order."""
    m = config.block_size
    rows, columns = hw[0] // config.patch // m, hw[1] // config.patch // m  # in blocks
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

    positions = np.full((config.images_per_group * size, m, m, 3), -1, np.int32)
    top = np.arange(m)
    filled = positions[: len(blocks)]
    filled[..., 0] = frame_ids[frames][:, None, None]
    filled[..., 1] = (blocks // columns * m)[:, None, None] + top[:, None]
    filled[..., 2] = (blocks % columns * m)[:, None, None] + top
    canvases = positions.reshape(config.images_per_group, rows, columns, m, m, 3)
    return canvases.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3)
