"""The first packs of a run, as training gets them, taken apart again by sample.

The loader's own functions read and choose the packs. Nothing is encoded for showing: what is shown
is read back from the Batch that build_pack made, the patches through `vision_index`, as the model
gathers them.
"""

import abc
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int8, Int32, UInt8

from ov2_jax.config.data import DataConfig, leaves
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import IGNORE, Batch
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.encoding.tokenizer import Tokenizer
from ov2_jax.data.loader.lookahead import Lookahead, read_samples
from ov2_jax.data.loader.planned import OpenedPlan, open_planned, read_packs
from ov2_jax.data.packing.build import ChosenPack, PackInfo, build_pack
from ov2_jax.data.packing.placement import Placement, WindowPlace
from ov2_jax.data.plan.folder import REJECTED
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sample import EncodedSample
from ov2_jax.data.sources.mixture import Mixture

TEXT, VISION, LOSS = range(3)  # kinds of tokens


class SeenSample(NamedTuple):
    """A sample as it lies in a pack; its patches are in the order of the placeholders."""

    id: str
    source: str
    file: str
    line: int
    task: str
    dropped_rounds: int
    uniform_fallbacks: int
    row: int  # of the pack's text rows
    offset: int  # tokens of the row before it
    tokens: Int32[np.ndarray, " n"]
    kinds: Int8[np.ndarray, " n"]  # TEXT, VISION or LOSS
    windows: tuple[int, ...]  # patches of each
    places: tuple[WindowPlace, ...]
    patches: UInt8[np.ndarray, "P values"]
    positions: Int32[np.ndarray, "P 3"]


class SeenPack(NamedTuple):
    info: PackInfo
    samples: tuple[SeenSample, ...]


class ShownPacks(abc.ABC):
    """An iterator over the packs that hold the first `count` samples (at most one epoch).

    The order is that of a run of one process. `rejected` has every rejected sample once. Unlike a
    run, this does not stop at data.max_reject_share: the page is there to find the cause.
    `progress` is called with the samples so far and their number. Raises ConfigError and DataError
    if the data or the plan cannot be used.
    """

    names: tuple[str, ...]  # of the data sets
    epoch: int  # samples
    origin: str  # how packs were chosen
    checked: str  # the samples among which `rejected` were found

    def __init__(
        self, pack: PackConfig, model: ModelConfig, count: int, progress: Callable[[int, int], None]
    ) -> None:
        self._pack, self._model, self._progress = pack, model, progress
        self.count = min(count, self.epoch)
        self._rejected: dict[tuple[str, int], Rejected] = {}

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        return tuple(self._rejected.values())

    def _reject(self, sample: Rejected) -> None:
        self._rejected.setdefault((sample.file, sample.line), sample)

    @abc.abstractmethod
    def _choose(self) -> Iterator[ChosenPack]: ...

    def __iter__(self) -> Iterator[SeenPack]:
        for samples, placements in self._choose():
            batch, info = build_pack(samples, placements, self._pack, self._model)
            seen = tuple(
                _seen(samples[p.sample], p, batch, self._pack, self._model) for p in placements
            )
            yield SeenPack(info, seen)


class LookaheadPacks(ShownPacks):
    """Packs without a plan. As in training the look-ahead is kept full, so a few more samples are
    read than are packed."""

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
        self._size, self._read = lookahead, 0

    @property
    def checked(self) -> str:
        return f"of {self._read} read"

    def _choose(self) -> Iterator[ChosenPack]:
        lookahead = Lookahead(self._pack, self._size)
        packed, rejected = 0, 0
        with contextlib.closing(read_samples(self._samples, 0, workers=0)) as samples:
            for ordinal, sample in enumerate(samples):
                self._read += 1
                self._progress(min(self._read, self.count), self.count)
                if isinstance(sample, Rejected):
                    rejected += 1
                    self._reject(sample)
                    if rejected == self._read >= self.count:
                        return  # no sample of an epoch can be used
                    continue
                lookahead.add(ordinal, sample)
                if lookahead.full:
                    chosen = lookahead.take_pack()
                    yield chosen
                    packed += len(chosen.placements)
                    if packed + rejected >= self.count:
                        return


class PlannedPacks(ShownPacks):
    """The packs of a plan; the samples that were rejected when it was made are listed as well."""

    origin = "of the plan"

    def __init__(
        self,
        opened: OpenedPlan,
        names: tuple[str, ...],
        pack: PackConfig,
        model: ModelConfig,
        count: int,
        progress: Callable[[int, int], None],
    ) -> None:
        plan = opened.plan
        self.names, self.epoch = names, plan.info.samples // len(plan.info.epochs)
        super().__init__(pack, model, count, progress)
        self._order, self._choose_pack = opened.order, opened.choose
        for line in (plan.folder / REJECTED).read_text().splitlines():
            self._reject(Rejected(**json.loads(line)))
        self.checked = f"in addition to {plan.info.samples} in the plan"

    def _choose(self) -> Iterator[ChosenPack]:
        packed = 0
        with contextlib.closing(read_packs(self._order, self._choose_pack, workers=0)) as packs:
            for chosen in packs:
                for sample in chosen.samples:
                    if isinstance(sample, Rejected):
                        self._reject(sample)
                yield chosen
                packed += len(chosen.samples)
                self._progress(min(packed, self.count), self.count)
                if packed >= self.count:
                    return


def show_packs(
    data: DataConfig,
    pack: PackConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    count: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShownPacks:
    """The packs that make_loader gives with the same arguments."""
    encoder = SampleEncoder(data, model, tokenizer, pack, seed=seed)
    if data.plan is None:
        mixture = Mixture(data.sources, seed=seed, shuffle=data.shuffle)
        return LookaheadPacks(mixture, encoder, data.lookahead, pack, model, count, progress)
    opened = open_planned(data, pack, model, tokenizer, encoder, seed)
    names = tuple(source.title for source in leaves(data.sources))
    return PlannedPacks(opened, names, pack, model, count, progress)


def _seen(
    sample: EncodedSample, place: Placement, batch: Batch, pack: PackConfig, model: ModelConfig
) -> SeenSample:
    """What the batch holds of a sample; only names and lengths come from the sample itself."""
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
    index: Int32[np.ndarray, " merged"], batch: Batch, pack: PackConfig, model: ModelConfig
) -> tuple[UInt8[np.ndarray, "P values"], Int32[np.ndarray, "P 3"]]:
    """The patches and positions that merged tokens of the pack are made of."""
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
