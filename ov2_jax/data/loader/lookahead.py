"""Packing without a plan: from the samples that wait in memory, the look-ahead.

    records -> mixture -> this process's share -> encode (threads or processes) -> pack

A rejected sample travels on as a marker in its place, so the order of samples, and with it every
batch, is the same for any number of workers. The state names samples by ordinal, their place in
this process's endless sequence: the next one, and those that wait in the look-ahead. Resuming reads
the waiting samples again by random access and continues at the next one.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain

from ov2_jax.config.data import DataConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import Batch
from ov2_jax.data.loader.counts import LoaderCounts, counted
from ov2_jax.data.loader.resume import ResumableSteps
from ov2_jax.data.loader.step import StepInfo, make_step
from ov2_jax.data.loader.workers import read_in_order
from ov2_jax.data.packing.build import ChosenPack, build_pack
from ov2_jax.data.packing.placement import place_pack
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sample import EncodedSample, SampleSize

# Encoded samples are large (a clip of 64 frames at 392 px has 30 MB), so few of them wait.
_READ_AHEAD = 8
_THREADS = 4


class WaitingSample(NamedTuple):
    ordinal: int
    sample: EncodedSample
    size: SampleSize


class Lookahead:
    """The samples that wait, up to `count`, and the choice of each pack from them."""

    def __init__(self, pack: PackConfig, count: int) -> None:
        self._pack, self._count = pack, count
        self._waiting: list[WaitingSample] = []

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self._count

    @property
    def ordinals(self) -> list[int]:
        return [w.ordinal for w in self._waiting]

    def add(self, ordinal: int, sample: EncodedSample) -> None:
        size = SampleSize(len(sample.tokens), tuple(sample.windows.tolist()))
        self._waiting.append(WaitingSample(ordinal, sample, size))

    def take_pack(self) -> ChosenPack:
        """Takes the samples of one pack out; the others keep waiting."""
        placements = place_pack([w.size for w in self._waiting], self._pack)
        chosen = ChosenPack([w.sample for w in self._waiting], placements)
        gone = {p.sample for p in placements}
        self._waiting = [w for i, w in enumerate(self._waiting) if i not in gone]
        return chosen

    def clear(self) -> None:
        self._waiting = []


def read_samples(samples: grain.MapDataset, start: int, workers: int) -> grain.DatasetIterator:
    """Encoded and rejected samples from ordinal `start` on."""
    return read_in_order(samples[start:], workers, ahead=_READ_AHEAD)


class LookaheadIterator(ResumableSteps):
    """Keeps the look-ahead full, takes packs from it, and counts.

    `samples` are this process's encoded samples, endless; a step has `packs` packs.
    """

    def __init__(
        self,
        samples: grain.MapDataset,
        data: DataConfig,
        pack: PackConfig,
        model: ModelConfig,
        packs: int,
        counts: LoaderCounts,
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__(counts, identity, identity["process_index"])
        self._samples, self._workers = samples, data.num_workers
        self._pack, self._model, self._packs = pack, model, packs
        self._lookahead = Lookahead(pack, data.lookahead)

    def __next__(self) -> tuple[Batch, StepInfo]:
        arrays, infos = [], []
        for _ in range(self._packs):
            self._fill()
            samples, placements = self._lookahead.take_pack()
            batch, info = build_pack(samples, placements, self._pack, self._model)
            arrays.append(batch)
            infos.append(info)
            for place in placements:
                self._counts.add_packed(counted(samples[place.sample]))
        return make_step(arrays, infos, self._pack, self._counts.totals())

    def _fill(self) -> None:
        if self._upstream is None:
            self._upstream = read_samples(self._samples, self._next, self._workers)
        while not self._lookahead.full:
            ordinal, sample = self._next, next(self._upstream)
            self._next += 1
            if isinstance(sample, Rejected):
                self._counts.add_read(sample)
            else:
                self._counts.add_read(counted(sample))
                self._lookahead.add(ordinal, sample)

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {"buffer": self._lookahead.ordinals}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        with ThreadPoolExecutor(_THREADS) as pool:
            waiting = list(pool.map(self._samples.__getitem__, state["buffer"]))
        self._lookahead.clear()
        for ordinal, sample in zip(state["buffer"], waiting, strict=True):
            if isinstance(sample, Rejected):  # it was readable before the restart
                self._counts.reject(sample)
            else:
                self._lookahead.add(ordinal, sample)
