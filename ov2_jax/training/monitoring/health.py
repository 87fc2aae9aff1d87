"""Whether a run makes progress: a heartbeat file of each process, and stacks of a hanging step."""

import collections
import faulthandler
import json
import math
import os
import socket
import statistics
import sys
import time

from etils import epath

from ov2_jax.core.files import write_file

_SLOW = 10.0  # times the median step
_LEAST_LIMIT = 60.0  # seconds
_FIRST_LIMIT = 1800.0  # seconds, until there is a median: restoring and compiling may take them
_BEAT_EVERY = 1.0  # seconds between two writes of the heartbeat, which may lie on a network


class Health:
    """Watches the steps of this process; it never ends a run.

    WORKDIR/heartbeat/process_00000.json is rewritten at most once a second: step (the newest one
    given to the devices), time (seconds since the epoch), step_seconds (since the step before),
    host, pid. If a step takes more than ten times the median of the last 50, and more than 60
    seconds, the stacks of all threads are written to WORKDIR/stacks/process_00000.txt. Until there
    is a median, the limit is 1800 seconds. faulthandler waits in a thread of its own that needs no
    interpreter lock, so a step that hangs in C is noticed too.
    """

    def __init__(self, workdir: epath.Path, process: int) -> None:
        self._heartbeat = workdir / "heartbeat" / f"process_{process:05d}.json"
        self._stacks = workdir / "stacks" / f"process_{process:05d}.txt"
        self._seconds: collections.deque[float] = collections.deque(maxlen=50)
        self._since = time.perf_counter()
        self._written = -math.inf
        self._beat: dict[str, float | int | str] | None = None

    def __enter__(self) -> "Health":
        self._heartbeat.parent.mkdir(parents=True, exist_ok=True)
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._stacks.open("a")
        self._size = self._file.tell()
        self._watch()
        return self

    def __exit__(self, *exc: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._stacks.stat().length:
            self._stacks.unlink()
        if self._beat is not None:
            self._write()

    def beat(self, step: int) -> None:
        """Called once a step: the devices have `step`, and have finished all others."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._report(step, seconds)
        if self._beat is not None:  # the first beat's time is that of restoring and compiling
            self._seconds.append(seconds)
        self._beat = {
            "step": step,
            "time": time.time(),
            "step_seconds": seconds,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        if now - self._written >= _BEAT_EVERY:
            self._write()
            self._written = now
        self._watch()

    def _watch(self) -> None:
        limit = _FIRST_LIMIT
        if self._seconds:
            limit = max(_LEAST_LIMIT, _SLOW * statistics.median(self._seconds))
        faulthandler.dump_traceback_later(limit, file=self._file)

    def _report(self, step: int, seconds: float) -> None:
        """If stacks were dumped before this step, notes that below them and on stderr."""
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() == self._size:
            return
        print(f"Above: before step {step}, reached after {seconds:.1f} s.", file=self._file)
        self._file.flush()
        self._size = self._file.tell()
        print(
            f"Step {step} came after {seconds:.1f} s; the threads' stacks are in {self._stacks}.",
            file=sys.stderr,
        )

    def _write(self) -> None:
        write_file(self._heartbeat, json.dumps(self._beat).encode())
