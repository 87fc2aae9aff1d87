"""Compiles in a process of its own: a compiler that gives up ends it, and libtpu stays there."""

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

from launch.accelerators import LaunchError, Tpu
from launch.planner.environment import for_compiling
from ov2_jax.core.errors import ConfigError, UserError

_LIMIT_S = 3600.0
_OWN = ("out", "search", "nosearch", "candidates")  # flags that only launch.plan has
_SWITCHES = ("search", "nosearch")


class CompileError(UserError):
    """A program that could not be compiled; the message is one sentence."""


def shared_arguments(argv: Sequence[str]) -> list[str]:
    """Of launch.plan's arguments those that the compiling process takes as well."""
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


def measure(tpu: Tpu, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs launch.planner.measure; raises the error that it reports, CompileError if it dies."""
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        result = pathlib.Path(folder) / "result.json"
        command = [sys.executable, "-m", "launch.planner.measure", f"--result={result}"]
        log = pathlib.Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, *arguments],
                env=for_compiling(tpu, os.environ),
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
        kinds = {kind.__name__: kind for kind in (ConfigError, LaunchError)}
        raise kinds[found["error"]["kind"]](found["error"]["message"])
    return found


def _reason(status: int, log: str) -> str:
    ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # An exception, or a line of the compiler's that says why it ended. JAX adds some behind these.
    said = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|FATAL |F\d{4} ", line)]
    last = (said or lines or ["it said nothing"])[-1]
    return f"The compiling process {ended}: {last[:400]}"
