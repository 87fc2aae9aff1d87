"""The first packs of a run, as training would get them, taken apart again by sample.

Nothing is encoded here: what is shown is read back from the Batch that build_pack made, the patches
through `vision_index`, as the model gathers them.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import grain
import numpy as np

from ov2_jax.data.batch import IGNORE, Batch
from ov2_jax.data.config import DataConfig, PackConfig
from ov2_jax.data.encode import SampleEncoder
from ov2_jax.data.errors import Rejected
from ov2_jax.data.mixture import Mixture
from ov2_jax.data.packing import (
    PackInfo,
    Placement,
    SampleSize,
    WindowPlace,
    build_pack,
    place_pack,
)
from ov2_jax.data.sample import EncodedSample
from ov2_jax.model.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_THREADS = 4
_READ_AHEAD = 8

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


class Road:
    """An iterator over the packs that hold the first `count` samples (at most one epoch).

    The order is that of a run with one process. As in training the look-ahead is kept full, so a
    few more samples are read than are packed. `rejected` has every bad sample once; unlike a run
    this does not stop at data.max_reject_share, as it is here that one looks for the cause.
    """

    def __init__(
        self,
        data: DataConfig,
        pack: PackConfig,
        model: ModelConfig,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        seed: int,
        count: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        encoder = SampleEncoder(data, model, tokenizer, pack, seed=seed)
        mixture = Mixture(data.sources, seed=seed, shuffle=data.shuffle)
        self._samples = grain.MapDataset.source(mixture).map(encoder)
        self._lookahead, self._pack, self._model = data.lookahead, pack, model
        self.names = mixture.names
        self.epoch = mixture.epoch
        self.count = min(count, mixture.epoch)
        self.read = 0
        self._rejected: dict[tuple[str, int], Rejected] = {}
        self._progress = progress

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        return tuple(self._rejected.values())

    def __iter__(self) -> Iterator[SeenPack]:
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_READ_AHEAD)
        upstream = iter(self._samples.to_iter_dataset(options))
        try:
            yield from self._packs(upstream)
        finally:
            upstream.close()

    def _packs(self, upstream: grain.DatasetIterator) -> Iterator[SeenPack]:
        buffer: list[EncodedSample] = []
        packed, bad = 0, 0
        while packed + bad < self.count:
            while len(buffer) < self._lookahead:
                sample = next(upstream)
                self.read += 1
                if isinstance(sample, Rejected):
                    bad += 1
                    self._rejected.setdefault((sample.file, sample.line), sample)
                    if not buffer and not packed and bad >= self.count:
                        return  # nothing of an epoch can be used
                    continue
                buffer.append(sample)
                self._progress(min(self.read, self.count), self.count)
            sizes = [SampleSize(len(s.tokens), tuple(s.windows.tolist())) for s in buffer]
            placements = place_pack(sizes, self._pack)
            batch, info = build_pack(buffer, placements, self._pack, self._model)
            seen = tuple(
                _seen(buffer[p.sample], p, batch, self._pack, self._model) for p in placements
            )
            yield SeenPack(info, seen)
            packed += len(placements)
            gone = {p.sample for p in placements}
            buffer = [sample for i, sample in enumerate(buffer) if i not in gone]


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
