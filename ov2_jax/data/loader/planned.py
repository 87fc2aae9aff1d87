"""Training by a plan: which packs a step has, and how they are made.

The order is a function of (plan, seed, pack number): packs are numbered endlessly, P of them are a
pass through the plan, and each pass has an order of its own. A step of G packs takes the next G,
process i of N its contiguous share of them. The state is the next pack's number, so a run goes on
after a change of processes, workers or packs a step without a sample lost or repeated.

A plan's pack is read as its samples are: encoded here, or read from packed shards. A sample that
turns out bad, or of another length than planned, leaves its place empty.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from ov2_jax.config.data import DataConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import Batch
from ov2_jax.data.loader.steps import Progress, Read, ResumableSteps, StepInfo
from ov2_jax.data.loader.workers import read_in_order
from ov2_jax.data.packing.build import PackInfo, build_pack
from ov2_jax.data.packing.placement import place_pack
from ov2_jax.data.plan.folder import Plan
from ov2_jax.data.plan.reading import Samples
from ov2_jax.data.rejected import Rejected

# A pack of 32768 tokens has some 100 MB of patches.
_PACKS_AHEAD = 4


class PackOrder:
    """`order[n]` is the plan's pack that training reads n-th, for any n.

    Where several epochs of the mixture were planned they follow one another, each in an order of
    its own, and then come again in other orders.
    """

    def __init__(self, epochs: Sequence[int], *, seed: int, shuffle: bool) -> None:
        self._ends = np.cumsum(epochs)
        self._epochs = epochs
        self._orders = []
        for i, packs in enumerate(epochs):
            order = grain.MapDataset.range(packs)
            if shuffle:
                own = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
                order = order.shuffle(seed=own)
            self._orders.append(order)

    def __getitem__(self, number: int) -> int:
        again, place = divmod(int(number), int(self._ends[-1]))
        epoch = int(np.searchsorted(self._ends, place, side="right"))
        packs = self._epochs[epoch]
        start = int(self._ends[epoch]) - packs
        return start + int(self._orders[epoch][again * packs + place - start])


class _Share:
    """This process's packs from a pack number on, endlessly."""

    def __init__(self, order: PackOrder, start: int, packs: int, index: int, count: int) -> None:
        self._order, self._start, self._packs = order, start, packs
        self._own, self._index = packs // count, index

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, ordinal: int) -> int:
        step, place = divmod(int(ordinal), self._own)
        return self._order[self._start + step * self._packs + self._index * self._own + place]


class MadePack(NamedTuple):
    """A pack, and what became of its samples."""

    batch: Batch
    info: PackInfo
    samples: tuple[Read | Rejected, ...]


class PackMaker:
    """Reads, places and builds pack n of a plan. Holds no state: for threads and processes."""

    def __init__(
        self,
        plan: Plan,
        read: Callable[[int], Samples],
        config: PackConfig,
        model: ModelConfig,
    ) -> None:
        self._plan, self._read, self._config, self._model = plan, read, config, model

    def __call__(self, pack: int) -> MadePack:
        sizes = [self._plan.size(int(record)) for record in self._plan.members(pack)]
        samples = self._read(pack)
        placements = [
            place
            for place in place_pack(sizes, self._config)
            if not isinstance(samples[place.sample], Rejected)
        ]
        batch, info = build_pack(samples, placements, self._config, self._model)
        reads = tuple(s if isinstance(s, Rejected) else Read.of(s) for s in samples)
        return MadePack(batch, info, reads)


class PlannedIterator(ResumableSteps):
    """Steps of `packs` packs by a plan; this process's share of them, and counts."""

    def __init__(
        self,
        order: PackOrder,
        maker: PackMaker,
        data: DataConfig,
        pack: PackConfig,
        packs: int,
        process_index: int,
        process_count: int,
        progress: Progress,
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__(progress, identity, process_index)
        self._order, self._maker, self._data, self._pack = order, maker, data, pack
        self._packs, self._index, self._count = packs, process_index, process_count

    def __next__(self) -> tuple[Batch, StepInfo]:
        if self._upstream is None:
            share = _Share(self._order, self._next, self._packs, self._index, self._count)
            packs = grain.MapDataset.source(share).map(self._maker)
            self._upstream = iter(read_in_order(packs, self._data.num_workers, ahead=_PACKS_AHEAD))
        made = [next(self._upstream) for _ in range(self._packs // self._count)]
        self._next += self._packs
        for pack in made:
            for sample in pack.samples:
                self._progress.read(sample)
                if isinstance(sample, Read):
                    self._progress.packed(sample)
        return self._progress.step([m.batch for m in made], [m.info for m in made], self._pack)
