"""The host side of a training run's data: Grain reads and encodes, this packs, both can resume.

    records -> mixture -> this process's share -> encode (threads or processes) -> pack

Bad samples travel as markers in their place, so the order of samples, and with it every batch, is
the same for any number of workers. The state names samples by ordinal (their place in this
process's endless sequence): the next one, and those that wait in the packer's buffer. Resuming
fetches the waiting ones again by random access and goes on at the next.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import numpy as np
from absl import flags

from ov2_jax.data.batch import Batch, VisionRows
from ov2_jax.data.config import DataConfig, PackConfig
from ov2_jax.data.encode import SampleEncoder
from ov2_jax.data.errors import DataError, Rejected
from ov2_jax.data.mixture import Mixture
from ov2_jax.data.packing import PackInfo, SampleSize, build_pack, place_pack
from ov2_jax.data.rejects import RejectLog
from ov2_jax.data.sample import EncodedSample
from ov2_jax.model.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Encoded samples are large (a clip of 64 frames at 392 px is 30 MB), so few of them wait.
_THREADS = 4
_READ_AHEAD = 8
_WORKER_READ_AHEAD = 2
_STEPS_AHEAD = 2


class StepInfo(NamedTuple):
    """What a step's packs (of this process) hold; `seen` and later ones count from the start."""

    sample_ids: tuple[tuple[str, ...], ...]  # of each pack
    samples: int
    tokens: int
    supervised_tokens: int
    patches: int
    windows: int
    token_slots: int
    patch_slots: int
    class_patches: tuple[int, ...]  # real patches by class of vision rows
    class_slots: tuple[int, ...]
    seen: int  # samples read
    rejected: int
    truncated: int  # samples that lost rounds (on_long="drop_rounds")
    mixture: tuple[tuple[str, int, int], ...]  # (data set, samples, tokens) packed


class _Given(NamedTuple):
    """Samples and tokens that a data set gave so far."""

    samples: int
    tokens: int


def _stack(packs: Sequence[Batch]) -> Batch:
    """Packs to one Batch with the leading axis G."""
    fields = [np.stack(arrays) for arrays in zip(*(p[:-1] for p in packs), strict=True)]
    classes = zip(*(p.vision for p in packs), strict=True)
    vision = tuple(VisionRows(*(np.stack(a) for a in zip(*rows, strict=True))) for rows in classes)
    return Batch(*fields, vision)


def _step_info(
    packs: Sequence[PackInfo],
    config: PackConfig,
    counts: Counter,
    rejected: int,
    given: dict[str, _Given],
) -> StepInfo:
    class_patches = tuple(
        sum(p.class_patches[k] for p in packs) for k in range(len(config.vision_rows))
    )
    return StepInfo(
        sample_ids=tuple(p.sample_ids for p in packs),
        samples=sum(len(p.sample_ids) for p in packs),
        tokens=sum(p.tokens for p in packs),
        supervised_tokens=sum(p.supervised_tokens for p in packs),
        patches=sum(class_patches),
        windows=sum(p.windows for p in packs),
        token_slots=len(packs) * config.token_slots,
        patch_slots=len(packs) * config.patch_slots,
        class_patches=class_patches,
        class_slots=tuple(len(packs) * r * w for r, w in config.vision_rows),
        seen=counts["seen"],
        rejected=rejected,
        truncated=counts["truncated"],
        mixture=tuple((name, *count) for name, count in given.items()),
    )


class _Waiting(NamedTuple):
    """A sample in the look-ahead buffer."""

    ordinal: int
    sample: EncodedSample
    size: SampleSize


def _waiting(ordinal: int, sample: EncodedSample) -> _Waiting:
    size = SampleSize(len(sample.tokens), tuple(sample.windows.tolist()))
    return _Waiting(ordinal, sample, size)


class _PackingIterator(grain.DatasetIterator):
    """Keeps the look-ahead buffer full, packs from it, and counts."""

    def __init__(
        self,
        samples: grain.MapDataset,
        data: DataConfig,
        pack: PackConfig,
        model: ModelConfig,
        packs: int,
        epoch: int,
        log: RejectLog,
        identity: dict[str, Any],
        names: Sequence[str],
    ) -> None:
        super().__init__()
        self._samples, self._data, self._pack, self._model = samples, data, pack, model
        self._packs, self._epoch, self._log, self._identity = packs, epoch, log, identity
        self._upstream: grain.DatasetIterator | None = None
        self._next = 0
        self._buffer: list[_Waiting] = []
        self._counts: Counter = Counter()
        self._reasons: Counter = Counter()
        self._given = dict.fromkeys(names, _Given(0, 0))
        self._rejected_in_a_row = 0

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
                self._count(samples[i])
            self._buffer = [w for i, w in enumerate(self._buffer) if i not in gone]
        rejected = self._reasons.total()
        step = _step_info(infos, self._pack, self._counts, rejected, self._given)
        return _stack(arrays), step

    def _count(self, sample: EncodedSample) -> None:
        before = self._given[sample.source]
        self._given[sample.source] = _Given(before.samples + 1, before.tokens + len(sample.tokens))

    def _fill(self) -> None:
        if self._upstream is None:
            self._upstream = iter(self._read_from(self._next))
        while len(self._buffer) < self._data.lookahead:
            ordinal, sample = self._next, next(self._upstream)
            self._next += 1
            self._counts["seen"] += 1
            if isinstance(sample, Rejected):
                self._reject(sample)
                continue
            self._rejected_in_a_row = 0
            self._counts["truncated"] += sample.dropped_rounds > 0
            self._buffer.append(_waiting(ordinal, sample))

    def _read_from(self, ordinal: int) -> grain.IterDataset:
        """The encoded samples from an ordinal on; the same for any number of workers."""
        samples = self._samples[ordinal:]
        workers = self._data.num_workers
        if not workers:
            options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_READ_AHEAD)
            return samples.to_iter_dataset(options)
        if not flags.FLAGS.is_parsed():  # Grain's workers ask absl's flags, also in a notebook
            flags.FLAGS.mark_as_parsed()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_WORKER_READ_AHEAD)
        return samples.to_iter_dataset(options).mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=_WORKER_READ_AHEAD
            )
        )

    def _reject(self, sample: Rejected) -> None:
        self._log.add(sample)
        self._reasons[sample.reason] += 1
        self._rejected_in_a_row += 1
        seen, rejected = self._counts["seen"], self._reasons.total()
        allowed = self._data.max_reject_share
        enough = min(self._data.reject_check_after, self._epoch)
        if rejected > allowed * seen and seen >= enough:
            cause = f"that is more than data.max_reject_share {allowed:g} allows"
        elif self._rejected_in_a_row >= self._epoch:
            cause = "a whole epoch had no usable sample"
        else:
            return
        reasons = ", ".join(f"{reason} {n}" for reason, n in self._reasons.most_common(3))
        raise DataError(
            f"{rejected} of {seen} samples were rejected ({reasons}); {cause}. Each is in "
            f"{self._log.path}; the last: {sample.file} line {sample.line}: {sample.detail}."
        )

    # --- state ------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        return {
            "identity": dict(self._identity),
            "next": self._next,
            "buffer": [w.ordinal for w in self._buffer],
            "counts": dict(self._counts),
            "reasons": dict(self._reasons),
            "given": {name: list(count) for name, count in self._given.items()},
            "rejected_in_a_row": self._rejected_in_a_row,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        for name, value in self._identity.items():
            then = state["identity"].get(name)
            if then != value:
                raise DataError(
                    f"The checkpoint's data state was made with {name} {then} but this run has "
                    f"{value}; resume with the same, or start the data anew."
                )
        self._close_upstream()
        self._next = state["next"]
        self._counts, self._reasons = Counter(state["counts"]), Counter(state["reasons"])
        self._given = {name: _Given(*count) for name, count in state["given"].items()}
        self._rejected_in_a_row = state["rejected_in_a_row"]
        with ThreadPoolExecutor(_THREADS) as pool:
            waiting = list(pool.map(self._samples.__getitem__, state["buffer"]))
        self._buffer = []
        for ordinal, sample in zip(state["buffer"], waiting, strict=True):
            if isinstance(sample, Rejected):  # it was readable before the restart
                self._reject(sample)
            else:
                self._buffer.append(_waiting(ordinal, sample))

    def _close_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None

    def close(self) -> None:
        self._close_upstream()
        super().close()


class _PackedDataset(grain.IterDataset):
    """What Grain's prefetching thread wants: something that makes the iterator."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self._args = args

    def __iter__(self) -> _PackingIterator:
        return _PackingIterator(*self._args)


def make_loader(
    data: DataConfig,
    pack: PackConfig,
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    packs_per_step: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    rejects_path: str | Path,
) -> grain.DatasetIterator:
    """An endless iterator over (Batch with the axis G = packs_per_step / process_count, StepInfo).

    Every epoch has an order of its own (unless `data.shuffle` is off), equal on all processes, and
    each takes every process_count-th sample of it. `get_state` describes what was handed out, not
    what was prepared ahead; it is small JSON and works with grain.checkpoint. Close the iterator
    when done.

    Rejected samples are appended to `rejects_path`; with several processes each writes a file of
    its own (`rejected.jsonl` becomes `rejected-00003.jsonl`). Raises ConfigError, and DataError
    when the data cannot be used or too many samples are rejected.
    """
    if packs_per_step <= 0 or packs_per_step % process_count:
        raise ConfigError(
            f"packs_per_step is {packs_per_step}; it must be a positive multiple of the "
            f"{process_count} processes."
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index {process_index} is not one of {process_count} processes.")
    rejects_path = Path(rejects_path)
    if process_count > 1:
        name = f"{rejects_path.stem}-{process_index:05d}{rejects_path.suffix}"
        rejects_path = rejects_path.with_name(name)
    encoder = SampleEncoder(data, model, tokenizer, pack)
    mixture = Mixture(data.sources, seed=seed, shuffle=data.shuffle)
    samples = grain.MapDataset.source(mixture)[process_index::process_count].map(encoder)
    identity = {
        "samples": mixture.epoch,
        "samples_by_source": list(mixture.draws),
        "shuffle": data.shuffle,
        "seed": seed,
        "process_index": process_index,
        "process_count": process_count,
    }
    packed = _PackedDataset(
        samples,
        data,
        pack,
        model,
        packs_per_step // process_count,
        -(-mixture.epoch // process_count),
        RejectLog(rejects_path),
        identity,
        mixture.names,
    )
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=_STEPS_AHEAD)
    )
