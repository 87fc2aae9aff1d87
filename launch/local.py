"""A run of several processes on this machine:

    python -m launch.local --processes=2 --devices-per-process=4 -- \\
        --config=configs/quickstart.py --config.workdir=DIR

Arguments after `--` go to ov2_jax.train. By default each process has fake CPU devices, to try a run
of many hosts; with --platform=cuda each process has its own GPUs. Every output line starts with the
rank of its process. A process that dies ends the job, and a message has its status and last lines.
SIGTERM and Ctrl-C are passed on, so that the run saves. Status: 0 done, 75 stopped and saved (run
it again), 1 failed.
"""

import collections
import ctypes
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from absl import flags

from launch.errors import LaunchError
from ov2_jax.core import program
from ov2_jax.core.exit_codes import INTERRUPTED

# Seconds that the other processes have after one failed. Few: they hang in a collective with it.
_KILL_AFTER = 5.0
_LAST_LINES = 20
_COLOURS = (36, 33, 35, 32, 34, 31)  # cyan, yellow, magenta, green, blue, red


def process_environment(
    rank: int, *, processes: int, devices: int, platform: str, port: int, base: Mapping[str, str]
) -> dict[str, str]:
    """The environment of one process: `base`, its rank and its devices; raises LaunchError."""
    found = dict(base) | {
        "JAX_PLATFORMS": platform,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(rank),
        "PYTHONUNBUFFERED": "1",
    }
    if platform == "cpu":
        name = "--xla_force_host_platform_device_count"
        others = re.sub(rf"{name}=\S*", "", base.get("XLA_FLAGS", ""))
        found["XLA_FLAGS"] = f"{others} {name}={devices}".strip()
    else:
        # If the launcher itself may use only some GPUs of the machine, the processes share those.
        count = processes * devices
        ids = (base.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
        if len(ids) < count:
            raise LaunchError(
                f"--processes={processes} times --devices-per-process={devices} need {count} GPUs, "
                f"but CUDA_VISIBLE_DEVICES names {len(ids)}; use fewer."
            )
        found["CUDA_VISIBLE_DEVICES"] = ",".join(ids[rank * devices : (rank + 1) * devices])
    return found


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _status(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}"
    return f"was ended by {signal.Signals(-code).name} (status {128 - code})"


def _die_with_parent() -> None:
    """In the child: the kernel kills it with its launcher, so nothing keeps holding devices."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _Process:
    """One rank. Its output goes to stderr line by line, its exit code into the queue `ended`."""

    def __init__(self, rank: int, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.rank = rank
        self.last = collections.deque[str](maxlen=_LAST_LINES)
        # A session of its own: Ctrl-C reaches only the launcher, and one kill ends all descendants.
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )

    def watch(self, ended: queue.Queue) -> None:
        prefix = f"[{self.rank}] "
        if sys.stderr.isatty():
            prefix = f"\x1b[{_COLOURS[self.rank % len(_COLOURS)]}m{prefix}\x1b[0m"
        reader = threading.Thread(
            target=self._read, args=(self._process.stdout, prefix), daemon=True
        )
        reader.start()
        threading.Thread(target=self._wait, args=(reader, ended), daemon=True).start()

    def _read(self, pipe: BinaryIO, prefix: str) -> None:
        for raw in pipe:
            line = raw.decode(errors="replace").rstrip("\r\n")
            self.last.append(line)
            sys.stderr.write(f"{prefix}{line}\n")
            sys.stderr.flush()

    def _wait(self, reader: threading.Thread, ended: queue.Queue) -> None:
        code = self._process.wait()
        self.signal(signal.SIGKILL)  # its descendants, which could keep the GPU and the pipe
        reader.join(timeout=2)
        ended.put((self.rank, code))

    def signal(self, number: signal.Signals) -> None:
        try:
            if number is signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)
        except ProcessLookupError:
            pass  # it has just ended


def run_processes(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Runs the command once for each environment; returns the job's status."""
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    # From here on signals are only noted; `_watch` handles them.
    stops: list[int] = []
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, lambda number, _: stops.append(number)) for number in signals]
    processes = [_Process(rank, command, env) for rank, env in enumerate(environments)]
    try:
        for process in processes:  # threads start after all forks: a fork after them may hang
            process.watch(ended)
        return _watch(processes, ended, stops)
    finally:
        for process in processes:
            process.signal(signal.SIGKILL)
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


def _watch(processes: Sequence[_Process], ended: queue.Queue, stops: Sequence[int]) -> int:
    codes: dict[int, int] = {}
    failed: tuple[int, int] | None = None
    passed_on, kill_at = 0, None
    while len(codes) < len(processes):
        while passed_on < len(stops):
            again = passed_on > 0
            _say(
                "Asked again to stop: all processes are killed."
                if again
                else f"{signal.Signals(stops[0]).name}: all processes are asked to save and stop."
            )
            for process in processes:
                process.signal(signal.SIGKILL if again else signal.SIGTERM)
            passed_on += 1
        if kill_at is not None and time.monotonic() > kill_at:
            for process in processes:
                process.signal(signal.SIGKILL)
            kill_at = None
        try:
            rank, code = ended.get(timeout=0.1)
        except queue.Empty:
            continue
        codes[rank] = code
        stopped = bool(stops) and code == -signal.SIGTERM  # it had nothing to save yet
        if code not in (0, INTERRUPTED) and not stopped and failed is None:
            failed = rank, code
            for process in processes:
                process.signal(signal.SIGTERM)
            kill_at = time.monotonic() + _KILL_AFTER
    if failed is not None:
        rank, code = failed
        lines = "".join(f"\n    {line}" for line in processes[rank].last) or " none"
        _say(
            f"Process {rank} {_status(code)}, so the job was ended. Its last lines:{lines}\n"
            "The same command continues from the newest checkpoint."
        )
        return 1
    return 0 if set(codes.values()) == {0} else INTERRUPTED


def _say(sentence: str) -> None:
    print(f"launch.local: {sentence}", file=sys.stderr, flush=True)


def define_flags() -> None:
    flags.DEFINE_integer("processes", 2, "Processes to start.", lower_bound=1)
    flags.DEFINE_integer("devices-per-process", 1, "Fake CPU devices, or GPUs.", lower_bound=1)
    flags.DEFINE_enum("platform", "cpu", ["cpu", "cuda"], "The devices of the processes.")


def main(given: program.Given) -> int:
    if not given.rest:
        raise LaunchError(
            "there are no arguments for ov2_jax.train; write them after --, for example: "
            "-- --config=FILE"
        )
    command = [sys.executable, "-m", "ov2_jax.train", *given.rest]
    if given.processes > 1:
        command.append("--config.distributed")
    port = _free_port()
    environments = [
        process_environment(
            rank,
            processes=given.processes,
            devices=given.devices_per_process,
            platform=given.platform,
            port=port,
            base=os.environ,
        )
        for rank in range(given.processes)
    ]
    return run_processes(command, environments)


if __name__ == "__main__":
    program.run(main, define_flags, rest=True)
