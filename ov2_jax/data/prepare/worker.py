"""The units of prepare's work.

A unit makes one file and depends on nothing but the job and its number. So it may be done anywhere,
in any order, and again: by a process of this machine or by a worker of a cluster (runners.py).
"""

from collections.abc import Iterator
from functools import cached_property

from etils import epath

from ov2_jax.core.files import write_file
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.encoding.tokenizer import load_tokenizer
from ov2_jax.data.plan.folder import PackPlan, packed_file
from ov2_jax.data.plan.lengths import measure_shard, shard_file
from ov2_jax.data.plan.packed_shards import write_packs
from ov2_jax.data.plan.reading import PackReader, Samples
from ov2_jax.data.prepare.job import PrepareJob
from ov2_jax.data.rejected import Rejected, rejected_line
from ov2_jax.data.sources.index import RecordSource


def packed_rejects_file(packed: epath.PathLike) -> epath.Path:
    """The file beside a packed shard that lists the rejected samples of its packs."""
    return epath.Path(packed).with_suffix(".rejected.jsonl")


class Worker:
    """Does units of a job. Opens the data when it is first needed, unless it gets `records`."""

    def __init__(self, job: PrepareJob, records: RecordSource | None = None) -> None:
        self.job, self._given = job, records

    @cached_property
    def records(self) -> RecordSource:
        return self._given or RecordSource(self.job.data.sources)

    @cached_property
    def _encoder(self) -> SampleEncoder:
        job = self.job
        tokenizer = load_tokenizer(job.tokenizer, job.model)
        return SampleEncoder(job.data, job.model, tokenizer, job.pack, seed=job.seed)

    @cached_property
    def _plan(self) -> PackPlan:
        return PackPlan(self.job.out)

    def measure(self, number: int) -> None:
        """Writes the lengths of shard `number`."""
        size = self.job.shard_size
        which = range(number * size, min((number + 1) * size, len(self.records)))
        measure_shard(self.records, self._encoder, which, shard_file(self.job.folder, number))

    def pack(self, number: int) -> None:
        """Writes file `number` of the encoded packs."""
        plan, size = self._plan, self.job.packs_per_file
        which = range(number * size, min((number + 1) * size, plan.packs))
        read = PackReader(plan, self.records, self._encoder)
        path = packed_file(plan.folder, plan.info.digest, size, number)
        lines: list[bytes] = []

        def packs() -> Iterator[Samples]:
            for pack in which:
                samples = read(pack)
                lines.extend(rejected_line(s) for s in samples if isinstance(s, Rejected))
                yield samples
            # Before the file of the packs appears, as its presence means that both are done.
            write_file(packed_rejects_file(path), b"".join(lines))

        write_packs(epath.Path(path), packs())
