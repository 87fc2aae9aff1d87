"""Where samples go: the one placement function, and the arrays of one pack.

A pack has B text rows of L tokens and vision rows in classes of R rows of W patches (PackConfig).
A sample lies whole in one text row; each of its windows (an image, or a few frames) lies whole in
one vision row. Attention in a vision row costs W^2 whatever lies in it, so a window goes to the
smallest class that still has room for it.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ov2_jax.data.batch import IGNORE, Batch, VisionRows
from ov2_jax.data.config import PackConfig
from ov2_jax.data.errors import DataError
from ov2_jax.data.sample import EncodedSample
from ov2_jax.model.config import ModelConfig


class SampleSize(NamedTuple):
    """What placement needs to know of a sample."""

    tokens: int
    windows: tuple[int, ...]  # patches of each window, in order


class WindowPlace(NamedTuple):
    size: int  # index of the class in PackConfig.vision_rows
    row: int
    offset: int


class Placement(NamedTuple):
    """Where one sample of the candidates went."""

    sample: int  # index into the candidates
    row: int
    offset: int
    windows: tuple[WindowPlace, ...]


class _Pack:
    """Free space while one pack is filled."""

    def __init__(self, config: PackConfig) -> None:
        limit = config.max_samples_per_row or config.seq_len
        self.seq_len = config.seq_len
        self.tokens = [config.seq_len] * config.rows
        self.samples = [limit] * config.rows
        self.widths = [w for _, w in config.vision_rows]
        self.rows = [[w] * r for r, w in config.vision_rows]
        self.most_tokens = config.seq_len  # of the row with the most room
        self.patches = config.patch_slots  # room for patches in all

    def _window(self, patches: int) -> WindowPlace | None:
        """Best fit in the smallest class with room; takes the room."""
        for size in range(bisect_left(self.widths, patches), len(self.widths)):
            free, best, left = self.rows[size], -1, self.widths[size] + 1
            for row, room in enumerate(free):
                if patches <= room < left:
                    best, left = row, room
            if best >= 0:
                free[best] -= patches
                return WindowPlace(size, best, self.widths[size] - left)
        return None

    def place(self, index: int, sample: SampleSize, patches: int) -> Placement | None:
        """Takes the room for a sample of so many patches in all, or returns None."""
        tokens, windows = sample
        best, left = -1, self.seq_len + 1
        for row, room in enumerate(self.tokens):
            if tokens <= room < left and self.samples[row]:
                best, left = row, room
        if best < 0:
            return None
        places: tuple[WindowPlace, ...] = ()
        if windows:
            if patches > self.patches:
                return None
            found: list[WindowPlace | None] = [None] * len(windows)
            # Large windows first: a small one must not take the room of a large one.
            for i in sorted(range(len(windows)), key=lambda i: -windows[i]):
                found[i] = self._window(windows[i])
                if found[i] is None:
                    for j, place in enumerate(found):
                        if place is not None:
                            self.rows[place.size][place.row] += windows[j]
                    return None
            self.patches -= patches
            places = tuple(found)
        self.tokens[best] -= tokens
        self.samples[best] -= 1
        self.most_tokens = max(self.tokens)
        return Placement(index, best, self.seq_len - left, places)


def place_pack(candidates: Sequence[SampleSize], config: PackConfig) -> list[Placement]:
    """Fills one pack from candidates in order of arrival; a pure function of lengths.

    The oldest candidate always goes in, so none waits forever; then the others, from the one that
    takes the largest share of either budget to the smallest, each into the fullest text row and
    vision rows with room. What does not fit is left for the next pack. Raises DataError if the
    oldest candidate does not even fit into an empty pack; encoding must have rejected it.
    """
    if not candidates:
        return []
    pack = _Pack(config)
    patches = [sum(windows) for _, windows in candidates]
    first = pack.place(0, candidates[0], patches[0])
    if first is None:
        raise DataError(
            f"A sample of {candidates[0].tokens} tokens and {patches[0]} patches "
            "does not fit into an empty pack."
        )
    placements = [first]
    per_patch = config.token_slots / max(config.patch_slots, 1)
    # Minus the larger of the two shares of a pack, in tokens: sorting puts the largest first.
    order = sorted(
        (-max(sample.tokens, patches[i] * per_patch), i) for i, sample in enumerate(candidates) if i
    )
    for _, index in order:
        sample = candidates[index]
        # Most candidates of a full pack are turned away here; this keeps planning quick.
        if sample.tokens > pack.most_tokens or patches[index] > pack.patches:
            continue
        placed = pack.place(index, sample, patches[index])
        if placed is not None:
            placements.append(placed)
    return placements


def fits_alone(sample: SampleSize, config: PackConfig) -> bool:
    """Whether an empty pack holds the sample."""
    return _Pack(config).place(0, sample, sum(sample.windows)) is not None


# --- arrays ---------------------------------------------------------------------------------------


class PackInfo(NamedTuple):
    """What a pack holds."""

    sample_ids: tuple[str, ...]
    tokens: int
    supervised_tokens: int
    class_patches: tuple[int, ...]  # real patches in each class
    windows: int


def _merged_starts(config: PackConfig, unit: int) -> list[int]:
    """The flat merged token with which each class begins; at the end their number M."""
    starts = [0]
    for rows, width in config.vision_rows:
        starts.append(starts[-1] + rows * width // unit)
    return starts


def build_pack(
    samples: Sequence[EncodedSample],
    placements: Sequence[Placement],
    config: PackConfig,
    model: ModelConfig,
) -> tuple[Batch, PackInfo]:
    """The arrays of one pack (a Batch without its G axis) and what it holds.

    Raises DataError where a sample's placeholders and patches differ in number.
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
            rows, there = vision[window.size], slice(window.offset, window.offset + patches)
            row_windows[window.size][window.row] += 1
            rows.patches[window.row, there] = sample.patches[begin : begin + patches]
            rows.patch_positions[window.row, there] = sample.patch_positions[
                begin : begin + patches
            ]
            rows.segment_ids[window.row, there] = row_windows[window.size][window.row]
            width = config.vision_rows[window.size][1]
            start = starts[window.size] + (window.row * width + window.offset) // unit
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
