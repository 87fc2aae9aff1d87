"""Packing by a plan: the order of the packs, and how each is made.

The order is a function of (plan, seed, pack number). Packs are numbered endlessly; P of them are a
pass through the plan, and each pass has an order of its own. A step of G packs takes the next G,
and process i of N takes its contiguous share of them. The state is the number of the next pack, so
a run resumes with another number of processes, workers or packs per step, and no sample is lost or
repeated.

The samples of a plan's pack are encoded here, or read from packed shards. A sample that is rejected
now, or whose length is not the planned one, leaves its place empty.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import grain
import numpy as np

from ov2_jax.config.data import DataConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import Batch
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.encoding.tokenizer import Tokenizer
from ov2_jax.data.loader.counts import CountedSample, LoaderCounts, counted
from ov2_jax.data.loader.resume import ResumableSteps
from ov2_jax.data.loader.step import StepInfo, make_step
from ov2_jax.data.loader.workers import read_in_order
from ov2_jax.data.packing.build import ChosenPack, PackInfo, build_pack
from ov2_jax.data.packing.placement import place_pack
from ov2_jax.data.plan.fingerprint import encoding_inputs
from ov2_jax.data.plan.folder import PackPlan
from ov2_jax.data.plan.reading import Samples, open_plan
from ov2_jax.data.rejected import Rejected

# A pack of 32768 tokens has some 100 MB of patches.
_PACKS_AHEAD = 4


# --- the order ------------------------------------------------------------------------------------


class PackOrder:
    """`order[n]` is the plan's pack that training reads n-th, for any n.

    A plan may have several epochs of the mixture. They follow one another, each in an order of its
    own, and then repeat in other orders.
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


def _number(ordinal: int, *, start: int, packs: int, index: int, count: int) -> int:
    """The number of the ordinal-th pack that process `index` reads from number `start` on."""
    step, place = divmod(ordinal, packs // count)
    return start + step * packs + index * (packs // count) + place


def read_packs(
    order: PackOrder,
    make: Callable[[int], Any],
    *,
    workers: int,
    start: int = 0,
    packs: int = 1,
    index: int = 0,
    count: int = 1,
) -> grain.DatasetIterator:
    """What `make` makes of each pack of the plan, endlessly, from pack number `start` on.

    A step has `packs` packs, of which process `index` of `count` reads its share.
    """
    number = partial(_number, start=start, packs=packs, index=index, count=count)
    made = grain.MapDataset.range(2**62).map(number).map(order.__getitem__).map(make)
    return read_in_order(made, workers, ahead=_PACKS_AHEAD)


# --- packs ----------------------------------------------------------------------------------------


def choose_pack(
    plan: PackPlan, read: Callable[[int], Samples], config: PackConfig, pack: int
) -> ChosenPack:
    """Reads and places the samples of a pack of the plan."""
    sizes = [plan.size(int(record)) for record in plan.members(pack)]
    samples = read(pack)
    placements = place_pack(sizes, config)
    return ChosenPack(
        samples, [p for p in placements if not isinstance(samples[p.sample], Rejected)]
    )


class OpenedPlan(NamedTuple):
    plan: PackPlan
    order: PackOrder
    choose: Callable[[int], ChosenPack]  # holds no state: for threads and processes


def open_planned(
    data: DataConfig,
    pack: PackConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    encoder: SampleEncoder,
    seed: int,
) -> OpenedPlan:
    """Opens data.plan for reading; raises DataError if it was made for another config or data."""
    plan, read = open_plan(data, encoding_inputs(data, model, pack, tokenizer, seed), encoder)
    order = PackOrder(plan.info.epochs, seed=seed, shuffle=data.shuffle)
    return OpenedPlan(plan, order, partial(choose_pack, plan, read, pack))


class MadePack(NamedTuple):
    """The arrays of a pack, and what counting needs of its samples."""

    batch: Batch
    info: PackInfo
    samples: tuple[CountedSample | Rejected, ...]


def make_pack(
    choose: Callable[[int], ChosenPack], config: PackConfig, model: ModelConfig, pack: int
) -> MadePack:
    samples, placements = choose(pack)
    batch, info = build_pack(samples, placements, config, model)
    return MadePack(
        batch, info, tuple(s if isinstance(s, Rejected) else counted(s) for s in samples)
    )


# --- steps ----------------------------------------------------------------------------------------


class PlannedIterator(ResumableSteps):
    """Steps of `packs` packs by a plan, of which process `index` of `count` has its share."""

    def __init__(
        self,
        opened: OpenedPlan,
        data: DataConfig,
        pack: PackConfig,
        model: ModelConfig,
        packs: int,
        index: int,
        count: int,
        counts: LoaderCounts,
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__(counts, identity, index)
        self._pack, self._packs, self._own = pack, packs, packs // count
        self._open = partial(
            read_packs,
            opened.order,
            partial(make_pack, opened.choose, pack, model),
            workers=data.num_workers,
            packs=packs,
            index=index,
            count=count,
        )

    def __next__(self) -> tuple[Batch, StepInfo]:
        if self._upstream is None:
            self._upstream = self._open(start=self._next)
        made = [next(self._upstream) for _ in range(self._own)]
        self._next += self._packs
        for pack in made:
            for sample in pack.samples:
                self._counts.add_read(sample)
                if isinstance(sample, CountedSample):
                    self._counts.add_packed(sample)
        batches, infos = [m.batch for m in made], [m.info for m in made]
        return make_step(batches, infos, self._pack, self._counts.totals())
