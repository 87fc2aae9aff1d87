"""Writes a run's metrics: metrics.jsonl, TensorBoard, the progress bar, Weights & Biases."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tensorboardX import SummaryWriter

from ov2_jax.core.files import write_file

_WAIT_SHOWN = 0.05  # share of the time; a smaller one is not worth a place in the bar


def _keep_until(path: epath.Path, step: int) -> None:
    """Drops lines after `step`, which a resumed run will write again, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    write_file(path, "".join(kept).encode())


def json_line(values: Mapping[str, Any]) -> str:
    """Strict JSON: a number that is not finite becomes null."""
    return json.dumps(
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    )


class MetricWriter:
    """Writes a step's metrics everywhere; only that of the first process is `active`."""

    def __init__(
        self,
        workdir: epath.Path,
        *,
        steps: int,
        start: int,
        config: Mapping[str, Any],
        wandb_project: str | None,
        active: bool,
    ) -> None:
        self._active = active
        self._wandb = None
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=120,
            disable=not active,
        )
        self._task = self._progress.add_task("train", total=steps, completed=start, numbers="")
        self._console, self._steps = console, steps
        if not active:
            return
        jsonl = workdir / "metrics.jsonl"
        _keep_until(jsonl, start)
        self._jsonl = jsonl.open("a")
        self._tensorboard = SummaryWriter(os.fspath(workdir / "tensorboard"), purge_step=start + 1)
        if wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=wandb_project, name=workdir.name, config=dict(config), resume="allow"
            )

    def __enter__(self) -> "MetricWriter":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
        if self._active:
            self._jsonl.close()
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def note(self, sentence: str) -> None:
        """Prints a line for people, above the bar."""
        if self._active:
            self._console.print(sentence, highlight=False)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step's line in metrics.jsonl, its TensorBoard scalars, and the bar."""
        if not self._active:
            return
        self._jsonl.write(json_line({"step": step, **metrics}) + "\n")
        self._jsonl.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)
        numbers = (
            f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"{metrics['patches_per_second']:,.0f} patches/s"
        )
        if metrics["data_wait_share"] >= _WAIT_SHOWN:
            numbers += f"  waits for data {metrics['data_wait_share']:.0%}"
        self._progress.update(self._task, completed=step, numbers=numbers)
        if not self._console.is_terminal and (step % max(1, self._steps // 20) == 0):
            self._console.print(f"step {step}/{self._steps}  {numbers}", highlight=False)
