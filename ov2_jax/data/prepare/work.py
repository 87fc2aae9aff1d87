"""Units of prepare's work, and processes of this machine that do them.

A unit makes one file and depends on nothing but the job and its number, so it may be done anywhere,
in any order, and again: by a process here or by a worker of a cluster (prepare_beam.py).
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from multiprocessing.connection import wait
from typing import NamedTuple

from etils import epath

from ov2_jax.config.data import DataConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import DataError
from ov2_jax.data.encoding.encode import SampleEncoder
from ov2_jax.data.encoding.tokenizer import load_tokenizer
from ov2_jax.data.plan.folder import Plan, packed_file
from ov2_jax.data.plan.lengths import measure_shard, reject_line, shard_file, write_lines
from ov2_jax.data.plan.packed_shards import write_packs
from ov2_jax.data.plan.reading import PackEncoder, Samples
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sources.index import RecordSource


class Job(NamedTuple):
    """What prepare is asked for; small, for it is sent to workers."""

    data: DataConfig
    pack: PackConfig
    model: ModelConfig
    tokenizer: str  # folder
    seed: int
    out: str
    shard_size: int = 1024  # records
    packs_per_file: int = 32
    epochs: int = 1

    @property
    def folder(self) -> epath.Path:
        return epath.Path(self.out)


def rejects_file(packed: str) -> epath.Path:
    """Beside a packed shard: its packs' bad samples."""
    return epath.Path(packed).with_suffix(".rejected.jsonl")


class Worker:
    """Does units of a job. Opens files when first needed."""

    def __init__(self, job: Job, records: RecordSource | None = None) -> None:
        self.job, self._given = job, records

    @cached_property
    def _records(self) -> RecordSource:
        return self._given or RecordSource(self.job.data.sources)

    @cached_property
    def _encoder(self) -> SampleEncoder:
        job = self.job
        tokenizer = load_tokenizer(job.tokenizer, job.model)
        return SampleEncoder(job.data, job.model, tokenizer, job.pack, seed=job.seed)

    @cached_property
    def _plan(self) -> Plan:
        return Plan(self.job.out)

    def measure(self, number: int) -> None:
        """Lengths of shard `number`."""
        size = self.job.shard_size
        which = range(number * size, min((number + 1) * size, len(self._records)))
        measure_shard(self._records, self._encoder, which, shard_file(self.job.folder, number))

    def pack(self, number: int) -> None:
        """File `number` of the encoded packs."""
        plan, size = self._plan, self.job.packs_per_file
        which = range(number * size, min((number + 1) * size, plan.packs))
        read = PackEncoder(plan, self._records, self._encoder)
        path = packed_file(plan.folder, plan.info.digest, size, number)
        rejects: list[bytes] = []

        def packs() -> Iterator[Samples]:
            for pack in which:
                samples = read(pack)
                rejects.extend(reject_line(s) for s in samples if isinstance(s, Rejected))
                yield samples
            # Before the packs' file is there, which says that both are done.
            write_lines(rejects_file(path), rejects)

        write_packs(epath.Path(path), packs())


# Runs units of one kind ("measure" or "pack") by their numbers, and says which is done.
Runner = Callable[[Worker, str, Sequence[int], Callable[[int], None]], None]


class Processes:
    """Runs units in processes of this machine; 1: in this one. Close it when done."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __call__(
        self, worker: Worker, unit: str, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        if self._count == 1 or not numbers:
            for number in numbers:
                getattr(worker, unit)(number)
                done(number)
            return
        if self._pool is None:
            # Not forked: libraries that read files have threads, whose locks would stay locked.
            self._pool = ProcessPoolExecutor(
                self._count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(worker,),
            )
        try:
            running = {self._pool.submit(_do, unit, number): number for number in numbers}
            for finished in as_completed(running):
                finished.result()
                done(running[finished])
        except BrokenProcessPool as error:
            raise DataError(
                "A worker process of prepare died, most likely of too little memory; run the same "
                "command again (what is finished is kept), with a smaller --num-workers."
            ) from error

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_worker: Worker | None = None


def _start(worker: Worker) -> None:
    global _worker
    _worker = worker
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent tells nobody, and its workers would wait for work forever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _do(unit: str, number: int) -> None:
    getattr(_worker, unit)(number)
