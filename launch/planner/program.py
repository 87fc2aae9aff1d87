"""The program behind launch/plan.py: checks, compiles, prints, writes."""

import pathlib
import re
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from launch.accelerators import Gpu, LaunchError, Tpu, parse_accelerator
from launch.planner import show
from launch.planner.chips import GIB
from launch.planner.compiling import measure, shared_arguments
from launch.planner.environment import libtpu_version
from launch.planner.experiment import check, planned_experiment
from launch.planner.report import report
from launch.planner.search import Candidate, candidates, rank
from ov2_jax.config.experiment import Experiment
from ov2_jax.core.errors import UserError
from ov2_jax.core.program import Given


def slice_of(text: str) -> Tpu:
    """Raises LaunchError for what cannot be planned."""
    if re.search(r"[*,+@ ]|^\d+x?v", text):
        raise LaunchError(
            f"--topology is {text!r}; several slices cannot be planned, only one: plan a slice "
            "with its share of global_rows and mesh.data=1. Between slices only gradients travel."
        )
    kind = parse_accelerator(text)
    if isinstance(kind, Gpu):
        raise LaunchError(
            f"--topology is {text!r}, a GPU; the compiler for GPUs needs one, so plans are for "
            "TPU slices, as v5p:4x4x8."
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
    """Compiles candidates of one command line and shows what it is doing."""

    def __init__(self, tpu: Tpu, title: str, console: Console) -> None:
        self._tpu, self._title, self._console = tpu, title, console
        self._arguments = shared_arguments(sys.argv[1:])
        self._command = shlex.join(["python", "-m", "launch.plan", *sys.argv[1:]])

    def plan(self, what: str, extra: Sequence[str] = ()) -> dict[str, Any]:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=self._console, transient=True) as progress:
            progress.add_task(f"compiling {what}", total=None)
            measured = measure(self._tpu, [*self._arguments, *extra])
        return report(measured, self._title, self._command)

    def search(
        self, experiment: Experiment, most: int
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(the best plan, a row of each candidate); raises LaunchError where all failed."""
        tried, more = candidates(experiment, self._tpu, most)
        if more:
            self._console.print(f"{more} further candidates are left out (--candidates).")
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
    tpu = slice_of(given.topology)
    experiment = planned_experiment(given.config)
    out = _folder(given.out)
    if not given.search:
        check(experiment, tpu)
    version = libtpu_version()
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
