"""The `main` of launch/plan.py: checks, compiles, prints, writes."""

import pathlib
import re
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from launch.accelerators import Gpu, Tpu, parse_accelerator
from launch.errors import LaunchError
from launch.planner import libtpu, show
from launch.planner.chips import GIB
from launch.planner.compiling import run_in_process, shared_arguments
from launch.planner.experiment import check_slice, experiment_to_plan
from launch.planner.report import report
from launch.planner.search import Candidate, candidates, rank
from ov2_jax.config.experiment import Experiment
from ov2_jax.core.errors import UserError
from ov2_jax.core.program import Given


def parse_slice(text: str) -> Tpu:
    """Parses --topology; raises LaunchError for GPUs and several slices."""
    if re.search(r"[*,+@ ]|^\d+x?v", text):
        raise LaunchError(
            f"--topology is {text!r}; several slices cannot be planned: plan one slice with its "
            "share of global_rows and mesh.data=1. Between slices only gradients travel."
        )
    kind = parse_accelerator(text)
    if isinstance(kind, Gpu):
        raise LaunchError(
            f"--topology is {text!r}, a GPU; the compiler for GPUs needs one, so plans are for "
            "TPU slices, for example v5p:4x4x8."
        )
    return kind


def _folder(out: str | None) -> pathlib.Path | None:
    if out is None:
        return None
    folder = pathlib.Path(out)
    if folder.exists() and not folder.is_dir():
        raise LaunchError(f"--out is {out!r}, which is no folder.")
    return folder


class Planner:
    """Makes the plans of one command line and shows its progress."""

    def __init__(self, tpu: Tpu, title: str, console: Console) -> None:
        self._tpu, self._title, self._console = tpu, title, console
        self._arguments = shared_arguments(sys.argv[1:])
        self._command = shlex.join(["python", "-m", "launch.plan", *sys.argv[1:]])

    def plan(self, label: str, extra: Sequence[str] = ()) -> dict[str, Any]:
        """Compiles with the command line's arguments and `extra`; returns the plan."""
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=self._console, transient=True) as progress:
            progress.add_task(f"compiling {label}", total=None)
            measured = run_in_process(self._tpu, [*self._arguments, *extra])
        return report(measured, self._title, self._command)

    def search(
        self, experiment: Experiment, most: int
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(the best plan, a row for each candidate); raises LaunchError if all failed."""
        tried, more = candidates(experiment, self._tpu, most)
        if more:
            self._console.print(f"{more} further candidates are not compiled (--candidates).")
        best: dict[str, Any] | None = None
        rows = []
        for number, candidate in enumerate(tried, 1):
            start = time.perf_counter()
            try:
                plan = self.plan(f"{number} of {len(tried)}: {candidate}", candidate.arguments())
                row = _row(candidate, plan)
                if best is None or rank([_row(candidate, best), row])[0] is row:
                    best = plan
            except UserError as e:
                row = _failed(candidate, str(e))
            row["seconds"] = time.perf_counter() - start
            rows.append(row)
            self._console.print(f"{number} of {len(tried)}: {candidate}: {show.outcome(row)}")
        if best is None:
            raise LaunchError(f"none of {len(tried)} candidates compiled: {rows[-1]['error']}")
        return best, rank(rows)


def _row(candidate: Candidate, plan: dict[str, Any]) -> dict[str, Any]:
    return {
        "mesh": candidate.mesh,
        "remat": candidate.remat,
        "error": None,
        "fits": plan["memory"]["fits"],
        "gib": plan["memory"]["total"] / GIB,
        "step_seconds": max(plan["bounds"].values()),
        "bounds": plan["bounds"],
        "mfu_ceiling": plan["mfu_ceiling"],
        "matmuls": plan["ratios"]["matmuls"]["ratio"],
        "weights": plan["ratios"]["weights"]["ratio"],
    }


def _failed(candidate: Candidate, error: str) -> dict[str, Any]:
    return {"mesh": candidate.mesh, "remat": candidate.remat, "error": error, "fits": False}


def main(given: Given) -> int:
    console = Console(stderr=True)
    tpu = parse_slice(given.topology)
    experiment = experiment_to_plan(given.config)
    out = _folder(given.out)
    if not given.search:
        check_slice(experiment, tpu)
    version = libtpu.installed_version()
    planner = Planner(tpu, given.config_file.stem, console)
    rows: list[dict[str, Any]] = []
    if given.search:
        plan, rows = planner.search(experiment, given.candidates)
    else:
        plan = planner.plan(given.topology)
    plan |= {"search": rows, "libtpu": version}
    show.print_plan(plan)
    if out is not None:
        for path in show.write(plan, out):
            print(path)
    return 0 if plan["memory"]["fits"] else 1
