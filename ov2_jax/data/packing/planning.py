"""Plans a whole corpus: which samples share a pack, if all lengths are known.

The packer that the loader uses without a plan (placement.Packer) fills the packs, from some
hundreds of samples that wait. The packs of a step should cost the same, and no pack should be all
clips or all text. So samples of each size arrive at an even pace, and small samples, which fill
gaps, arrive a little ahead of large ones.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64, Real

from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import DataError
from ov2_jax.data.packing.placement import Packer, PackSpace, Runs

_WAITING = 192  # samples to choose from; more take longer and do not fill better
_STRATA = 64
_AHEAD = 2.0  # packs' worth of samples that wait in addition
_CHUNK = 1 << 16


class Lengths(NamedTuple):
    """Lengths of records; `windows` has those of all records, one record after the other."""

    tokens: Int[np.ndarray, " records"]
    windows: Int[np.ndarray, " windows"]  # patches of each
    ends: Int[np.ndarray, " records"]  # record i has windows[ends[i - 1] : ends[i]]


class Packs(NamedTuple):
    """The records of each pack. `place_pack` on the sizes of a pack's records, in this order,
    places all of them, so placements are not stored."""

    members: Int64[np.ndarray, " members"]  # record numbers
    ends: Int64[np.ndarray, " packs"]  # pack i has members[ends[i - 1] : ends[i]]


class LengthTable:
    """Lengths as placement needs them: sums, the largest window, and runs of equal windows.

    Raises DataError if the lengths are not positive or their ends are inconsistent.
    """

    def __init__(self, lengths: Lengths) -> None:
        tokens, windows, ends = (np.asarray(a, np.int64) for a in lengths)
        if len(tokens) != len(ends) or (ends[-1] if len(ends) else 0) != len(windows):
            raise DataError(
                f"{len(tokens)} lengths and {len(windows)} windows have {len(ends)} ends; "
                "each record needs an end, and the last must be the number of windows."
            )
        counts = np.diff(ends, prepend=0)
        if (tokens <= 0).any() or (windows <= 0).any() or (counts < 0).any():
            raise DataError("Lengths must be positive, and their ends must not decrease.")
        self.tokens, starts = tokens, ends - counts
        # The windows of each record, the largest first: sorted by (record, -window) in one number.
        owner = np.repeat(np.arange(len(tokens)), counts)
        top = int(windows.max(initial=0))
        codes = np.sort(owner * (top + 1) + (top - windows))
        first = np.flatnonzero(np.diff(codes, prepend=-1))
        self.run_windows = top - codes[first] % (top + 1)
        self.run_counts = np.diff(first, append=len(codes))
        self.run_ends = np.searchsorted(first, ends)
        sums = np.concatenate([[0], np.cumsum(windows)])
        self.patches = sums[ends] - sums[starts]
        self.largest = np.zeros_like(tokens)
        some = counts > 0
        self.largest[some] = top - codes[starts[some]] % (top + 1)

    def rows(self, records: Int[np.ndarray, " members"]) -> Iterator[tuple[int, int, int, Runs]]:
        """(record, tokens, patches, runs) of each. Arrays become lists a chunk at a time."""
        for begin in range(0, len(records), _CHUNK):
            part = records[begin : begin + _CHUNK]
            ends = self.run_ends[part]
            starts = np.where(part > 0, self.run_ends[part - 1], 0)
            runs = zip(
                self.run_windows[(here := _ranges(starts, ends))].tolist(),
                self.run_counts[here].tolist(),
                strict=True,
            )
            columns = (part, self.tokens[part], self.patches[part], ends - starts)
            for record, tokens, patches, count in zip(*(c.tolist() for c in columns), strict=True):
                yield record, tokens, patches, tuple(itertools.islice(runs, count))


def _ranges(
    starts: Int[np.ndarray, " records"], ends: Int[np.ndarray, " records"]
) -> Int[np.ndarray, " values"]:
    """arange(start, end) of each record, one after the other."""
    counts = ends - starts
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)


def find_misfit(
    table: LengthTable, records: Int[np.ndarray, " members"], config: PackConfig
) -> int | None:
    """One of the records that does not fit into an empty pack; None if all fit."""
    tokens, patches, largest = (a[records] for a in (table.tokens, table.patches, table.largest))
    # A row has no room for a window only if it is filled to within a window of its width, so that
    # many patches surely fit. Few records have more, and these are placed.
    sure = largest.copy()
    for count, width in config.vision_rows:
        sure += np.where(largest <= width, count * (width - largest), 0)
    widest = max((w for _, w in config.vision_rows), default=0)
    doubtful = (tokens > config.seq_len) | (patches > sure) | (largest > widest)
    for sample in table.rows(np.unique(records[doubtful])):
        if PackSpace(config).place(*sample) is None:
            return sample[0]
    return None


def _arrival(
    size: Int[np.ndarray, " members"],
    vision: Bool[np.ndarray, " members"],
    eager: Real[np.ndarray, " members"],
) -> tuple[Int[np.ndarray, " members"], float]:
    """The order in which samples arrive, and how much of them (the sum of `size`) should wait.

    Samples are cut into strata of similar size, and the samples of each stratum arrive, in the
    given order, at an even pace. The lower a sample's `eager`, the earlier it arrives: about
    _WAITING samples wait, and from the start they are the ones that wait later too.
    """
    n = len(size)
    rank = np.lexsort((size, vision))
    volume = np.cumsum(size[rank])
    stratum = np.empty(n, np.int64)  # cut by volume and by number
    stratum[rank] = (volume - size[rank]) * _STRATA // volume[-1] + np.arange(n) * _STRATA // n
    by_stratum = np.argsort(stratum, kind="stable")
    counts = np.bincount(stratum)
    number = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)
    # Strata start at different fractions of their pace, or all would arrive at once.
    offset = np.arange(len(counts)) * 0.6180339887 % 1
    when = np.empty(n)
    when[by_stratum] = (number + np.repeat(offset, counts)) / np.repeat(counts, counts)
    late = np.empty(n)
    late[np.argsort(eager, kind="stable")] = np.arange(n) / n
    waiting = min(_WAITING, n / 32)  # few in a small corpus, or the first and last packs are odd
    early = 2 * waiting / n * (1 - late)
    return np.argsort(np.maximum(when - early, 0), kind="stable"), float(early.dot(size))


def plan_packs(lengths: Lengths, order: Int[np.ndarray, " members"], config: PackConfig) -> Packs:
    """Packs all records of `order`, each entry once; a record may come several times.

    A pure function of its arguments. The packs are not ordered by length, but a run that wants them
    in random order must shuffle them. Raises DataError if a record does not fit into an empty pack.
    """
    order = np.asarray(order, np.int64)
    if not len(order):
        return Packs(order, order)
    table = LengthTable(lengths)
    if order.min() < 0 or order.max() >= len(table.tokens):
        raise DataError(
            f"The order names records {order.min()} to {order.max()}, but there are lengths of "
            f"{len(table.tokens)} records."
        )
    misfit = find_misfit(table, order, config)
    if misfit is not None:
        raise DataError(
            f"Record {misfit} of {table.tokens[misfit]} tokens and {table.patches[misfit]} patches "
            "does not fit into an empty pack; leave it out of the order, or make the pack larger."
        )
    return plan_table(table, order, config)


def plan_table(table: LengthTable, order: Int[np.ndarray, " members"], config: PackConfig) -> Packs:
    """`plan_packs` of records that all fit."""
    per_patch = config.token_slots / max(config.patch_slots, 1)
    size = np.maximum(table.tokens, np.ceil(table.patches * per_patch).astype(np.int64))
    # Packs prefer large samples and, if tokens run out first, samples with patches (see Packer).
    dense = np.minimum(table.patches * per_patch / table.tokens, 1)
    tokens_bind = table.patches[order].sum() * per_patch < table.tokens[order].sum()
    eager = size * (1 + dense) ** 4 if tokens_bind else size
    arrival, reserve = _arrival(size[order], table.patches[order] > 0, eager[order])
    reserve += _AHEAD * config.token_slots
    packer, coming = Packer(config), table.rows(order[arrival])
    arrived = np.cumsum(size[order[arrival]]).tolist()  # how much has arrived with each sample
    members: list[int] = []
    ends: list[int] = []
    at, packed, n = 0, 0, len(order)
    while len(members) < n:
        # What has arrived and what is packed decide, not a clock, so samples never run out.
        while at < n and arrived[at] <= packed + reserve:
            packer.add(*next(coming))
            at += 1
        records = [placed[0] for placed in packer.fill()]
        packed += int(size[records].sum())
        members += records
        ends.append(len(members))
    return Packs(np.array(members, np.int64), np.array(ends, np.int64))
