"""Grain's threads or worker processes, with the same order of elements from either."""

import grain
from absl import flags

_THREADS = 4
_STEPS_AHEAD = 2


def read_in_order(elements: grain.MapDataset, workers: int, *, ahead: int) -> grain.IterDataset:
    """The elements one after the other, made by so many processes, or by threads if 0.

    About `ahead` elements wait. They are the same, in the same order, for any number of workers.
    """
    if not workers:
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=ahead)
        return elements.to_iter_dataset(options)
    if not flags.FLAGS.is_parsed():  # Grain's workers ask absl's flags, also in a notebook
        flags.FLAGS.mark_as_parsed()
    # Each worker holds elements in both of its buffers.
    of_worker = max(1, ahead // 4)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=of_worker)
    return elements.to_iter_dataset(options).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=of_worker)
    )


class _Steps(grain.IterDataset):
    """What Grain's prefetching thread wants: something that makes the iterator."""

    def __init__(self, kind: type[grain.DatasetIterator], *args: object) -> None:
        super().__init__()
        self._kind, self._args = kind, args

    def __iter__(self) -> grain.DatasetIterator:
        return self._kind(*self._args)


def steps_ahead(kind: type[grain.DatasetIterator], *args: object) -> grain.DatasetIterator:
    """Steps, of which a thread makes the next; the state is that of the steps taken."""
    steps = _Steps(kind, *args)
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(steps, prefetch_buffer_size=_STEPS_AHEAD)
    )
