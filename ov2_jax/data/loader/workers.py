"""Grain's threads and worker processes; both give the same elements in the same order."""

from collections.abc import Callable

import grain
from absl import flags

_THREADS = 4
_STEPS_AHEAD = 2


def read_in_order(elements: grain.MapDataset, workers: int, *, ahead: int) -> grain.DatasetIterator:
    """The elements one after the other, made by `workers` processes, or by threads if 0.

    About `ahead` elements wait. They are the same, in the same order, for any number of workers.
    """
    if not workers:
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=ahead)
        return iter(elements.to_iter_dataset(options))
    if not flags.FLAGS.is_parsed():  # Grain's workers read absl's flags, also in a notebook
        flags.FLAGS.mark_as_parsed()
    # Each worker holds elements in both of its buffers.
    of_worker = max(1, ahead // 4)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=of_worker)
    dataset = elements.to_iter_dataset(options).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=of_worker)
    )
    return iter(dataset)


class _Steps(grain.IterDataset):
    """An IterDataset, which Grain's prefetching thread needs, of any iterator."""

    def __init__(self, make: Callable[[], grain.DatasetIterator]) -> None:
        super().__init__()
        self._make = make

    def __iter__(self) -> grain.DatasetIterator:
        return self._make()


def steps_ahead(make: Callable[[], grain.DatasetIterator]) -> grain.DatasetIterator:
    """The steps of the iterator that `make` returns. A thread makes the next ones; the state is
    that of the steps that were taken."""
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(
            _Steps(make), prefetch_buffer_size=_STEPS_AHEAD
        )
    )
