"""The arrays of one pack."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import IGNORE, Batch, VisionRows
from ov2_jax.core.errors import DataError
from ov2_jax.data.packing.placement import Placement
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sample import EncodedSample


class ChosenPack(NamedTuple):
    """Candidates for a pack, and the places of those that go into it."""

    samples: Sequence[EncodedSample | Rejected]
    placements: Sequence[Placement]  # of no rejected sample


class PackInfo(NamedTuple):
    """What a pack holds."""

    sample_ids: tuple[str, ...]
    tokens: int
    supervised_tokens: int
    class_patches: tuple[int, ...]  # real patches in each row class
    windows: int


def _merged_starts(config: PackConfig, unit: int) -> list[int]:
    """The first merged token of each row class; at the end their number M."""
    starts = [0]
    for rows, width in config.vision_rows:
        starts.append(starts[-1] + rows * width // unit)
    return starts


def build_pack(
    samples: Sequence[EncodedSample | Rejected],
    placements: Sequence[Placement],
    config: PackConfig,
    model: ModelConfig,
) -> tuple[Batch, PackInfo]:
    """The arrays of one pack (a Batch without its G axis) and what it holds.

    `samples` are candidates, of which those in `placements` are used. Raises DataError if a
    sample's placeholders and patches differ in number.
    """
    shape = (config.rows, config.seq_len)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    targets, vision_index = (np.full(shape, fill, np.int32) for fill in (IGNORE, -1))
    patch_dim, unit = model.vision.patch_dim, model.vision.merge_unit
    vision = tuple(
        VisionRows(
            patches=np.zeros((r, w, patch_dim), np.uint8),
            patch_positions=np.zeros((r, w, 3), np.int32),
            segment_ids=np.zeros((r, w), np.int32),
        )
        for r, w in config.vision_rows
    )
    starts = _merged_starts(config, unit)
    row_samples = [0] * config.rows
    row_windows = [[0] * r for r, _ in config.vision_rows]
    for place in placements:
        sample = samples[place.sample]
        n = len(sample.tokens)
        here = (place.row, slice(place.offset, place.offset + n))
        row_samples[place.row] += 1
        tokens[here] = sample.tokens
        positions[here] = np.arange(n)
        segments[here] = row_samples[place.row]
        targets[here][:-1] = np.where(sample.loss_mask[1:], sample.tokens[1:], IGNORE)
        merged, begin = [], 0
        for window, patches in zip(place.windows, sample.windows.tolist(), strict=True):
            row_class, row, offset = window
            rows, width = vision[row_class], config.vision_rows[row_class][1]
            own, there = slice(begin, begin + patches), (row, slice(offset, offset + patches))
            row_windows[row_class][row] += 1
            rows.patches[there] = sample.patches[own]
            rows.patch_positions[there] = sample.patch_positions[own]
            rows.segment_ids[there] = row_windows[row_class][row]
            start = starts[row_class] + (row * width + offset) // unit
            merged.append(np.arange(start, start + patches // unit, dtype=np.int32))
            begin += patches
        pads = np.flatnonzero(sample.tokens == model.image_token_id)
        if len(pads) * unit != begin:
            raise DataError(f"Sample {sample.id} has {len(pads)} placeholders for {begin} patches.")
        if merged:
            vision_index[here][pads] = np.concatenate(merged)
    info = PackInfo(
        sample_ids=tuple(samples[p.sample].id for p in placements),
        tokens=int(np.count_nonzero(segments)),
        supervised_tokens=int(np.count_nonzero(targets != IGNORE)),
        class_patches=tuple(int(np.count_nonzero(v.segment_ids)) for v in vision),
        windows=sum(len(p.windows) for p in placements),
    )
    return Batch(tokens, targets, positions, segments, vision_index, vision), info
