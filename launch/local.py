"""A run of several processes on this machine:

    python -m launch.local --processes=2 --devices-per-process=4 -- \\
        --config=configs/quickstart.py --config.workdir=DIR

What follows `--` goes to ov2_jax.train. By default each process has fake CPU devices, for trying
what will run on many hosts; --platform=cuda gives each its own GPUs. Lines come with the rank of
their process. A process that dies ends the job, with its status and last lines; SIGTERM and Ctrl-C
are passed on, so that the run saves. Status: 0 done, 75 stopped and saved (run it again), 1 failed.
"""

import argparse
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

from ov2_jax.core.exit_codes import INTERRUPTED

_KILL_AFTER = 5.0  # seconds that the others have once a process failed: they hang, so few
_LAST_LINES = 20
_COLOURS = (36, 33, 35, 32, 34, 31)  # cyan, yellow, magenta, green, blue, red


def environment(
    rank: int, *, processes: int, devices: int, platform: str, port: int, base: Mapping[str, str]
) -> dict[str, str]:
    """What tells a process who it is, on top of `base`."""
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
        # Of the GPUs that this job may use itself, if it is one of several on the machine.
        count = processes * devices
        ids = (base.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
        if len(ids) < count:
            raise SystemExit(
                f"--processes={processes} times --devices-per-process={devices} need {count} GPUs, "
                f"but CUDA_VISIBLE_DEVICES names {len(ids)}; ask for fewer."
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
    """In the child: a launcher that is killed leaves nothing behind that holds devices."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _Process:
    """One rank: its output goes to stderr line by line, its end into `ended`."""

    def __init__(self, rank: int, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.rank = rank
        self.last = collections.deque[str](maxlen=_LAST_LINES)
        # A session of its own: Ctrl-C reaches the launcher alone, and all below it can be killed.
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
        self.signal(signal.SIGKILL)  # whatever it left running, which could keep GPU and pipe
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


def run(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Runs the command once for each environment; returns the job's status."""
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    # Signals are for the main thread from now on; before it is ready they wait.
    stops: list[int] = []
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, lambda number, _: stops.append(number)) for number in signals]
    processes = [_Process(rank, command, env) for rank, env in enumerate(environments)]
    try:
        for process in processes:  # threads only now: a fork after them may hang
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
        stopped = bool(stops) and code == -signal.SIGTERM  # before there was anything to save
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
            "The same command goes on from the newest checkpoint."
        )
        return 1
    return 0 if set(codes.values()) == {0} else INTERRUPTED


def _say(sentence: str) -> None:
    print(f"launch.local: {sentence}", file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("launch.local", description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=_positive, default=2, help="to start; 2")
    parser.add_argument(
        "--devices-per-process", type=_positive, default=1, help="fake CPU devices, or GPUs; 1"
    )
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("train", nargs="*", metavar="-- ARGUMENT", help="what ov2_jax.train gets")
    given = parser.parse_args(argv)
    if not given.train:
        parser.error("what ov2_jax.train gets comes after --, as in: -- --config=FILE")
    command = [sys.executable, "-m", "ov2_jax.train", *given.train]
    if given.processes > 1:
        command.append("--config.distributed")
    port = _free_port()
    environments = [
        environment(
            rank,
            processes=given.processes,
            devices=given.devices_per_process,
            platform=given.platform,
            port=port,
            base=os.environ,
        )
        for rank in range(given.processes)
    ]
    raise SystemExit(run(command, environments))


if __name__ == "__main__":
    main(sys.argv[1:])
