"""Mixtures: the n-th sample that training reads, as a data set and a record of it.

One epoch of the mixture has a fixed number of samples of each data set (`draws`), in an order that
is shuffled anew each epoch. A data set that gives more or fewer samples than it has continues in
its own shuffled order in the next epoch, so all of its samples are read equally often. The order is
a function of (sources, seed, ordinal) and has no state, so a run can resume anywhere.
"""

import sys
from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np
from jaxtyping import Int64

from ov2_jax.config.data import SourceConfig, leaves
from ov2_jax.core.errors import DataError
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.records import RawRecord


def _natural(node: SourceConfig, sizes: dict[int, int]) -> Fraction:
    """Samples that a data set or group without a weight gives in an epoch."""
    if node.sources:
        count = sum((_natural(child, sizes) for child in node.sources), Fraction(0))
    else:
        count = Fraction(sizes[id(node)])
    count *= Fraction(1 if node.epochs is None else node.epochs)
    return count if node.cap is None else min(count, Fraction(node.cap))


def _split(total: int, shares: Sequence[Fraction]) -> list[int]:
    """`total` in proportion to the shares; what rounding leaves goes to the largest remainders."""
    whole = sum(shares)
    if not whole:
        return [0] * len(shares)
    quotas = [total * share / whole for share in shares]
    counts = [int(q) for q in quotas]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - quotas[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _assign(nodes: Sequence[SourceConfig], total: int, sizes: dict[int, int]) -> list[int]:
    """Samples of an epoch by leaf."""
    if nodes[0].weight is not None:
        shares = [Fraction(node.weight) for node in nodes]
    else:
        shares = [_natural(node, sizes) for node in nodes]
    counts = []
    for node, count in zip(nodes, _split(total, shares), strict=True):
        counts += _assign(node.sources, count, sizes) if node.sources else [count]
    return counts


def epoch_draws(sources: Sequence[SourceConfig], sizes: Sequence[int]) -> tuple[int, ...]:
    """The number of samples that each data set (leaf) gives in one epoch of the mixture.

    An epoch has the samples that the data sets give together by their `epochs` and `cap`. If data
    sets have weights, these samples are divided by weight. `sizes` are the leaves' records. Raises
    DataError for a data set whose share rounds to 0, or that has a weight but no sample.
    """
    found = leaves(sources)
    by_leaf = dict(zip(map(id, found), sizes, strict=True))
    total = round(sum((_natural(node, by_leaf) for node in sources), Fraction(0)))
    draws = tuple(_assign(sources, total, by_leaf))
    for leaf, size, count in zip(found, sizes, draws, strict=True):
        if count and not size:
            raise DataError(f"The data set {leaf.title} has a weight but no sample in {leaf.path}.")
        if size and not count:
            raise DataError(
                f"The data set {leaf.title} gets none of the {total} samples of an epoch; raise "
                "its weight or epochs, or leave it out."
            )
    return draws


class Mixture:
    """The endless order of reading: `mixture[n]` is the n-th RawRecord, for any n.

    Attributes:
      records: the records of all data sets.
      names: of the data sets (leaves).
      draws: samples of an epoch, by data set.
      epoch: samples of an epoch.
    """

    def __init__(self, sources: Sequence[SourceConfig], *, seed: int, shuffle: bool) -> None:
        self.records = RecordSource(sources)
        sizes = self.records.sizes
        self.names = tuple(leaf.title for leaf in leaves(sources))
        self.draws = epoch_draws(sources, sizes)
        self.epoch = sum(self.draws)
        self._ends = np.cumsum(self.draws)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._slots = grain.MapDataset.range(self.epoch)
        if shuffle:
            self._slots = self._slots.shuffle(seed=seed)
        self._orders = []
        for i, (size, count) in enumerate(zip(sizes, self.draws, strict=True)):
            order = grain.MapDataset.range(max(size, 1))
            if (
                shuffle and count != size
            ):  # a data set that is read whole needs only the slots' order
                own = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
                order = order.shuffle(seed=own)
            self._orders.append(order)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, ordinal: int) -> RawRecord:
        return self.records[self.locate(ordinal)[1]]

    def locate(self, ordinal: int) -> tuple[int, int]:
        """The data set's number, and the record's index among all records."""
        ordinal = int(ordinal)
        slot = int(self._slots[ordinal])
        leaf = int(np.searchsorted(self._ends, slot, side="right"))
        within = slot - int(self._ends[leaf]) + self.draws[leaf]
        drawn = ordinal // self.epoch * self.draws[leaf] + within
        return leaf, int(self._starts[leaf]) + int(self._orders[leaf][drawn])

    def epoch_records(self, epoch: int) -> Int64[np.ndarray, " records"]:
        """Indices of the records that an epoch reads, in order."""
        ordinals = range(epoch * self.epoch, (epoch + 1) * self.epoch)
        return np.fromiter((self.locate(n)[1] for n in ordinals), np.int64, self.epoch)
