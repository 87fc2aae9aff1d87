"""Units of prepare's work on a cluster, by Apache Beam (extra `prepare`)."""

from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from ov2_jax.data.prepare.work import Job, Worker


class _Unit(beam.DoFn):
    """Does the unit of each number; a worker opens the data once."""

    def __init__(self, job: Job, unit: str) -> None:
        self._job, self._unit = job, unit

    def setup(self) -> None:
        self._worker = Worker(self._job)

    def process(self, number: int) -> None:
        getattr(self._worker, self._unit)(number)


class Pipelines:
    """Runs units as a Beam pipeline with these options (`--runner=...` and what it needs)."""

    def __init__(self, args: Sequence[str]) -> None:
        self._args = list(args)

    def __call__(
        self, worker: Worker, unit: str, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        if not numbers:
            return
        with beam.Pipeline(options=PipelineOptions(self._args)) as pipeline:
            _ = (
                pipeline
                | "numbers" >> beam.Create(list(numbers))
                | "spread" >> beam.Reshuffle()
                | unit >> beam.ParDo(_Unit(worker.job, unit))
            )
        for number in numbers:
            done(number)
