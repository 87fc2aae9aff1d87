"""Mixtures: which sample of which data set is the n-th that training reads.

One epoch of the mixture has a fixed number of samples of each data set (`draws`); their order is
shuffled anew each epoch. A data set that gives more or fewer than it has goes on in its own
shuffled order from epoch to epoch, so all of its samples are seen equally often. Everything is a
function of (sources, seed, ordinal): nothing is remembered, and a run resumes anywhere.
"""

import sys
from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np

from ov2_jax.config.data import SourceConfig, leaves
from ov2_jax.core.errors import DataError
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.records import RawRecord


def _natural(node: SourceConfig, sizes: dict[int, int]) -> Fraction:
    """Samples that a data set or group gives in an epoch if no weight says otherwise."""
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
    """How many samples each data set (leaf) gives in one epoch of the mixture.

    An epoch has as many samples as the data sets give together by their `epochs` and `cap`; where
    data sets have weights, these samples are shared out by weight. Raises DataError for a data set
    whose share rounds to nothing, or that has a weight but no sample.
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
    """The endless order of reading: `mixture[n]` is the n-th RawRecord, for any n."""

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
            if shuffle and count != size:  # the slots' order is enough for one that is read whole
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

    def epoch_records(self, epoch: int) -> np.ndarray:
        """Indices of the records that an epoch reads, int64 [self.epoch], in order."""
        ordinals = range(epoch * self.epoch, (epoch + 1) * self.epoch)
        return np.fromiter((self.locate(n)[1] for n in ordinals), np.int64, self.epoch)
