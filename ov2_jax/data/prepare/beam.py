"""Units of prepare's work on a cluster, by Apache Beam (extra `prepare`)."""

from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from ov2_jax.data.prepare.job import PrepareJob
from ov2_jax.data.prepare.runners import Unit, do_unit
from ov2_jax.data.prepare.worker import Worker


class _DoUnit(beam.DoFn):
    """Does the unit of each number; a worker of the cluster opens the data once."""

    def __init__(self, job: PrepareJob, unit: Unit) -> None:
        self._job, self._unit = job, unit

    def setup(self) -> None:
        self._worker = Worker(self._job)

    def process(self, number: int) -> None:
        do_unit(self._worker, self._unit, number)


class BeamRunner:
    """Runs units as a Beam pipeline with these options (`--runner=...` and what it needs)."""

    def __init__(self, args: Sequence[str]) -> None:
        self._args = list(args)

    def __call__(
        self, worker: Worker, unit: Unit, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        if not numbers:
            return
        with beam.Pipeline(options=PipelineOptions(self._args)) as pipeline:
            _ = (
                pipeline
                | "numbers" >> beam.Create(list(numbers))
                | "spread" >> beam.Reshuffle()
                | unit >> beam.ParDo(_DoUnit(worker.job, unit))
            )
        for number in numbers:
            done(number)
