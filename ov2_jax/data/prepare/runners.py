"""Where the units of prepare's work are done: processes of this machine, or Apache Beam."""

import importlib.util
import multiprocessing
import os
import shlex
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Literal, Protocol, runtime_checkable

from ov2_jax.core.errors import ConfigError, DataError
from ov2_jax.data.prepare.worker import Worker

Unit = Literal["measure", "pack"]  # the Worker's method


@runtime_checkable
class Runner(Protocol):
    """Has a worker do the units of one kind with these numbers, in any order.

    Calls `done` with the number of each unit that is finished.
    """

    def __call__(
        self, worker: Worker, unit: Unit, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None: ...


def do_unit(worker: Worker, unit: Unit, number: int) -> None:
    getattr(worker, unit)(number)


class ProcessRunner:
    """Runs units in `count` processes of this machine; 1: in this process.

    It serves one worker, and it is a context manager, which ends the processes.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __call__(
        self, worker: Worker, unit: Unit, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        if self._count == 1 or not numbers:
            for number in numbers:
                do_unit(worker, unit, number)
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
                "A worker process of prepare died, most likely because memory ran out; run the "
                "same command again with a smaller --num-workers (finished work is kept)."
            ) from error

    def __enter__(self) -> "ProcessRunner":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_worker: Worker | None = None  # of a worker process


def _start(worker: Worker) -> None:
    global _worker
    _worker = worker
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent is killed; otherwise it would wait for work forever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _do(unit: Unit, number: int) -> None:
    do_unit(_worker, unit, number)


def beam_runner(args: str) -> Runner:
    """Runs units as an Apache Beam pipeline with these options, as one writes them in a shell.

    Raises ConfigError if Apache Beam is not installed.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise ConfigError("--beam needs Apache Beam; pip install 'ov2_jax[prepare]'.")
    from ov2_jax.data.prepare.beam import BeamRunner

    return BeamRunner(shlex.split(args))
