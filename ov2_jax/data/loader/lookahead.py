"""Packing without a plan: from as many samples as wait in memory.

    records -> mixture -> this process's share -> encode (threads or processes) -> pack

Bad samples travel as markers in their place, so the order of samples, and with it every batch, is
the same for any number of workers. The state names samples by ordinal (their place in this
process's endless sequence): the next one, and those that wait in the packer's buffer. Resuming
fetches the waiting ones again by random access and goes on at the next.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain

from ov2_jax.config.data import DataConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import Batch
from ov2_jax.data.loader.steps import Progress, Read, ResumableSteps, StepInfo
from ov2_jax.data.loader.workers import read_in_order
from ov2_jax.data.packing.build import build_pack
from ov2_jax.data.packing.placement import place_pack
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sample import EncodedSample, SampleSize

# Encoded samples are large (a clip of 64 frames at 392 px is 30 MB), so few of them wait.
_READ_AHEAD = 8
_THREADS = 4


class _Waiting(NamedTuple):
    """A sample in the look-ahead buffer."""

    ordinal: int
    sample: EncodedSample
    size: SampleSize


def _waiting(ordinal: int, sample: EncodedSample) -> _Waiting:
    size = SampleSize(len(sample.tokens), tuple(sample.windows.tolist()))
    return _Waiting(ordinal, sample, size)


class LookaheadIterator(ResumableSteps):
    """Keeps the look-ahead buffer full, packs from it, and counts.

    `samples` are this process's encoded samples, endless; a step has so many `packs`.
    """

    def __init__(
        self,
        samples: grain.MapDataset,
        data: DataConfig,
        pack: PackConfig,
        model: ModelConfig,
        packs: int,
        progress: Progress,
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__(progress, identity, identity["process_index"])
        self._samples, self._data, self._pack, self._model = samples, data, pack, model
        self._packs = packs
        self._buffer: list[_Waiting] = []

    def __next__(self) -> tuple[Batch, StepInfo]:
        arrays, infos = [], []
        for _ in range(self._packs):
            self._fill()
            placements = place_pack([w.size for w in self._buffer], self._pack)
            samples = [w.sample for w in self._buffer]
            batch, info = build_pack(samples, placements, self._pack, self._model)
            arrays.append(batch)
            infos.append(info)
            gone = {p.sample for p in placements}
            for i in gone:
                self._progress.packed(Read.of(samples[i]))
            self._buffer = [w for i, w in enumerate(self._buffer) if i not in gone]
        return self._progress.step(arrays, infos, self._pack)

    def _fill(self) -> None:
        if self._upstream is None:
            samples = self._samples[self._next :]
            self._upstream = iter(read_in_order(samples, self._data.num_workers, ahead=_READ_AHEAD))
        while len(self._buffer) < self._data.lookahead:
            ordinal, sample = self._next, next(self._upstream)
            self._next += 1
            if isinstance(sample, Rejected):
                self._progress.read(sample)
            else:
                self._progress.read(Read.of(sample))
                self._buffer.append(_waiting(ordinal, sample))

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {"buffer": [w.ordinal for w in self._buffer]}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        with ThreadPoolExecutor(_THREADS) as pool:
            waiting = list(pool.map(self._samples.__getitem__, state["buffer"]))
        self._buffer = []
        for ordinal, sample in zip(state["buffer"], waiting, strict=True):
            if isinstance(sample, Rejected):  # it was readable before the restart
                self._progress.reject(sample)
            else:
                self._buffer.append(_waiting(ordinal, sample))
