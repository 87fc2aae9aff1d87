"""The first packs of a run, as training would get them, taken apart again by sample.

Nothing is encoded here: what is shown is read back from the Batch that build_pack made, the patches
through `vision_index`, as the model gathers them.
"""

import abc
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from ov2_jax.config.data import DataConfig, leaves
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import IGNORE, Batch
from ov2_jax.data.encoding.encode import SampleEncoder
from ov2_jax.data.encoding.tokenizer import Tokenizer
from ov2_jax.data.loader.planned import PackOrder
from ov2_jax.data.loader.workers import read_in_order
from ov2_jax.data.packing.build import PackInfo, build_pack
from ov2_jax.data.packing.placement import Placement, WindowPlace, place_pack
from ov2_jax.data.plan.fingerprint import encoding_inputs
from ov2_jax.data.plan.folder import Plan
from ov2_jax.data.plan.reading import open_plan
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sample import EncodedSample, SampleSize
from ov2_jax.data.sources.mixture import Mixture

_READ_AHEAD = 8  # samples
_PACKS_AHEAD = 4

TEXT, VISION, LOSS = range(3)  # kinds of tokens


class SeenSample(NamedTuple):
    """A sample as it lies in a pack: n tokens, P patches of C*p*p values."""

    id: str
    source: str
    file: str
    line: int
    task: str
    dropped_rounds: int
    uniform_fallbacks: int
    row: int  # of the pack's text rows
    offset: int  # in it
    tokens: np.ndarray  # int32 [n]
    kinds: np.ndarray  # int8 [n]: TEXT, VISION or LOSS
    windows: tuple[int, ...]  # patches of each
    places: tuple[WindowPlace, ...]
    patches: np.ndarray  # uint8 [P C*p*p], in the order of the placeholders
    positions: np.ndarray  # int32 [P 3]


class SeenPack(NamedTuple):
    info: PackInfo
    samples: tuple[SeenSample, ...]


# Samples that wait, bad ones among them, and where those of this pack go.
_Chosen = tuple[Sequence[EncodedSample | Rejected], Sequence[Placement]]


class Road(abc.ABC):
    """An iterator over the packs that hold the first `count` samples (at most one epoch).

    The order is that of a run with one process. `rejected` has every bad sample once; unlike a run
    this does not stop at data.max_reject_share, as it is here that one looks for the cause.
    `progress` is told the samples so far and their number. Raises ConfigError and DataError where
    the data or the plan cannot be used.
    """

    names: tuple[str, ...]  # of the data sets
    epoch: int  # samples
    origin: str  # how packs were chosen
    aside: str  # what `rejected` is counted against

    def __init__(
        self, pack: PackConfig, model: ModelConfig, count: int, progress: Callable[[int, int], None]
    ) -> None:
        self._pack, self._model, self._progress = pack, model, progress
        self.count = min(count, self.epoch)
        self._rejected: dict[tuple[str, int], Rejected] = {}

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        return tuple(self._rejected.values())

    def _set_aside(self, sample: Rejected) -> None:
        self._rejected.setdefault((sample.file, sample.line), sample)

    @abc.abstractmethod
    def _choose(self) -> Iterator[_Chosen]: ...

    def __iter__(self) -> Iterator[SeenPack]:
        for samples, placements in self._choose():
            batch, info = build_pack(samples, placements, self._pack, self._model)
            seen = tuple(
                _seen(samples[p.sample], p, batch, self._pack, self._model) for p in placements
            )
            yield SeenPack(info, seen)


class LookaheadRoad(Road):
    """Without a plan. As in training the look-ahead is kept full, so a few more samples are read
    than are packed."""

    origin = "chosen from the look-ahead"

    def __init__(
        self,
        mixture: Mixture,
        encoder: SampleEncoder,
        lookahead: int,
        pack: PackConfig,
        model: ModelConfig,
        count: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self.names, self.epoch = mixture.names, mixture.epoch
        super().__init__(pack, model, count, progress)
        self._samples = grain.MapDataset.source(mixture).map(encoder)
        self._lookahead, self._read = lookahead, 0

    @property
    def aside(self) -> str:
        return f"of {self._read} read"

    def _choose(self) -> Iterator[_Chosen]:
        upstream = iter(read_in_order(self._samples, 0, ahead=_READ_AHEAD))
        buffer: list[EncodedSample] = []
        packed, bad = 0, 0
        with contextlib.closing(upstream):
            while packed + bad < self.count:
                while len(buffer) < self._lookahead:
                    sample = next(upstream)
                    self._read += 1
                    self._progress(min(self._read, self.count), self.count)
                    if not isinstance(sample, Rejected):
                        buffer.append(sample)
                        continue
                    bad += 1
                    self._set_aside(sample)
                    if not buffer and not packed and bad >= self.count:
                        return  # nothing of an epoch can be used
                sizes = [SampleSize(len(s.tokens), tuple(s.windows.tolist())) for s in buffer]
                placements = place_pack(sizes, self._pack)
                yield buffer, placements
                packed += len(placements)
                gone = {p.sample for p in placements}
                buffer = [sample for i, sample in enumerate(buffer) if i not in gone]


class PlannedRoad(Road):
    """By a plan; what was set aside when it was made is listed as well."""

    origin = "of the plan"

    def __init__(
        self,
        plan: Plan,
        read: Callable[[int], list[EncodedSample | Rejected]],
        order: PackOrder,
        names: tuple[str, ...],
        pack: PackConfig,
        model: ModelConfig,
        count: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self.names = names
        self.epoch = plan.info.samples // len(plan.info.epochs)
        super().__init__(pack, model, count, progress)
        self._plan, self._read, self._order = plan, read, order
        for line in (plan.folder / "rejected.jsonl").read_text().splitlines():
            self._set_aside(Rejected(**json.loads(line)))
        self.aside = f"beside {plan.info.samples} in the plan"

    def _choose(self) -> Iterator[_Chosen]:
        packs = grain.MapDataset.range(self._plan.packs).map(self._order.__getitem__)
        upstream = iter(read_in_order(packs.map(self._pack_of), 0, ahead=_PACKS_AHEAD))
        packed = 0
        with contextlib.closing(upstream):
            for samples, placements in upstream:
                for sample in samples:
                    if isinstance(sample, Rejected):
                        self._set_aside(sample)
                yield samples, placements
                packed += len(samples)
                self._progress(min(packed, self.count), self.count)
                if packed >= self.count:
                    return

    def _pack_of(self, number: int) -> _Chosen:
        sizes = [self._plan.size(int(record)) for record in self._plan.members(number)]
        samples = self._read(number)
        placements = place_pack(sizes, self._pack)
        return samples, [p for p in placements if not isinstance(samples[p.sample], Rejected)]


def open_road(
    data: DataConfig,
    pack: PackConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    count: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Road:
    """The road that make_loader takes with the same arguments."""
    encoder = SampleEncoder(data, model, tokenizer, pack, seed=seed)
    if data.plan is None:
        mixture = Mixture(data.sources, seed=seed, shuffle=data.shuffle)
        return LookaheadRoad(mixture, encoder, data.lookahead, pack, model, count, progress)
    inputs = encoding_inputs(data, model, pack, tokenizer, seed)
    plan, read = open_plan(data, inputs, encoder)
    order = PackOrder(plan.info.epochs, seed=seed, shuffle=data.shuffle)
    names = tuple(source.title for source in leaves(data.sources))
    return PlannedRoad(plan, read, order, names, pack, model, count, progress)


def _seen(
    sample: EncodedSample, place: Placement, batch: Batch, pack: PackConfig, model: ModelConfig
) -> SeenSample:
    """What the batch holds of a sample; of the sample itself only its name and its lengths."""
    here = place.row, slice(place.offset, place.offset + len(sample.tokens))
    index = batch.vision_index[here]
    targets = batch.targets[here]
    kinds = np.where(index >= 0, VISION, TEXT).astype(np.int8)
    kinds[1:][targets[:-1] != IGNORE] = LOSS  # a target is the next token
    patches, positions = _gather(index[index >= 0], batch, pack, model)
    return SeenSample(
        id=sample.id,
        source=sample.source,
        file=sample.file,
        line=sample.line,
        task=sample.task,
        dropped_rounds=sample.dropped_rounds,
        uniform_fallbacks=sample.uniform_fallbacks,
        row=place.row,
        offset=place.offset,
        tokens=batch.tokens[here].copy(),
        kinds=kinds,
        windows=tuple(sample.windows.tolist()),
        places=place.windows,
        patches=patches,
        positions=positions,
    )


def _gather(
    index: np.ndarray, batch: Batch, pack: PackConfig, model: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The patches and positions that flat merged tokens [k] stand for."""
    unit = model.vision.merge_unit
    patches = np.empty((len(index), unit, model.vision.patch_dim), np.uint8)
    positions = np.empty((len(index), unit, 3), np.int32)
    start = 0
    for (rows, width), vision in zip(pack.vision_rows, batch.vision, strict=True):
        end = start + rows * width // unit
        mine = (start <= index) & (index < end)
        patches[mine] = vision.patches.reshape(-1, unit, patches.shape[-1])[index[mine] - start]
        positions[mine] = vision.patch_positions.reshape(-1, unit, 3)[index[mine] - start]
        start = end
    return patches.reshape(-1, patches.shape[-1]), positions.reshape(-1, 3)
