"""Programs that a test starts: waited for with patience, and killed when the test is over."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

REPOSITORY = Path(__file__).parents[1]
PATIENCE = 900.0  # seconds; a machine that has much else to do takes ten times as long


class Program:
    """One program, its stderr in a file: a pipe that nobody reads would stop it."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def said(self) -> str:
        return self._log.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self._process.poll() is None, self.said()
            assert time.monotonic() < end, f"Not there in {PATIENCE} s: {self.said()}"
            time.sleep(0.005)

    def end(self, status: int = 0, seconds: float = PATIENCE) -> str:
        """What it said, once it has ended with this status."""
        assert self._process.wait(timeout=seconds) == status, self.said()
        return self.said()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """With all it started."""
        if self._process.poll() is None:
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            self._process.kill()
            self._process.wait()
