"""Compiles in a process of its own: a compiler that fails ends that process, and no other."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from launch.accelerators import Tpu
from launch.planner.libtpu import compile_environment
from ov2_jax.core.errors import UserError

_LIMIT_S = 3600.0
_OWN = ("out", "search", "nosearch", "candidates")  # flags that only launch.plan has
_SWITCHES = ("search", "nosearch")


class CompileError(UserError):
    """The compiling process failed; one sentence."""


def shared_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments of launch.plan that launch.planner.measure takes as well."""
    kept, skip = [], False
    for argument in argv:
        name, equals, _ = argument.lstrip("-").partition("=")
        if skip:
            skip = False
        elif argument.startswith("-") and name in _OWN:
            skip = not equals and name not in _SWITCHES
        else:
            kept.append(argument)
    return kept


def run_in_process(tpu: Tpu, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs launch.planner.measure and returns its result.

    Raises the UserError that it reports, or CompileError if the process dies.
    """
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        result = pathlib.Path(folder) / "result.json"
        command = [sys.executable, "-m", "launch.planner.measure", f"--result={result}"]
        log = pathlib.Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, *arguments],
                env=compile_environment(tpu, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
            try:
                status = process.wait(_LIMIT_S)
            except subprocess.TimeoutExpired as e:
                raise CompileError(f"The compile took longer than {_LIMIT_S / 60:g} min.") from e
            finally:
                process.kill()
                process.wait()
        if status or not result.exists():
            raise CompileError(_reason(status, log.read_text(errors="replace")))
        found = json.loads(result.read_text())
    if "error" in found:
        kinds = {kind.__name__: kind for kind in UserError.__subclasses__()}
        raise kinds.get(found["error"]["kind"], CompileError)(found["error"]["message"])
    return found


def _reason(status: int, log: str) -> str:
    ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # An exception, or a line in which the compiler gives its reason. JAX prints more after these.
    reasons = [x for x in lines if re.match(r"[\w.]*(Error|Exception)\b|FATAL |F\d{4} ", x)]
    last = (reasons or lines or ["it printed nothing"])[-1]
    return f"The compiling process {ended}: {last[:400]}"
