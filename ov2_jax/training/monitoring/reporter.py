"""Computes the metrics of a step from what the devices return and what the host counts."""

import collections
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax
from etils import epath

from ov2_jax.config.experiment import Experiment
from ov2_jax.core.errors import UserError
from ov2_jax.core.files import write_file
from ov2_jax.data.loader.step import StepInfo
from ov2_jax.training.monitoring.flops import Work, train_flops
from ov2_jax.training.monitoring.metrics import MetricWriter, json_line
from ov2_jax.training.state import Metrics


class TrainingError(UserError):
    """A run that diverged and must stop; its last checkpoint is whole."""


def _counts(info: StepInfo) -> dict[str, float]:
    """Of this process: samples and utilisation of the step, and counts since the start."""
    classes = zip(info.class_patches, info.class_slots, strict=True)
    return {
        "samples": info.samples,
        "utilisation/tokens": info.tokens / info.token_slots,
        "utilisation/patches": info.patches / max(1, info.patch_slots),
        **{f"utilisation/patches_class_{k}": n / slots for k, (n, slots) in enumerate(classes)},
        "data/seen": info.seen,
        "data/rejected": info.rejected,
        "data/dropped_rounds": info.dropped_rounds,
        "data/uniform_fallbacks": info.uniform_fallbacks,
        **_shares(info),
    }


def _shares(info: StepInfo) -> dict[str, float]:
    """Realised shares of samples and tokens since the start, if there are several data sets."""
    if len(info.mixture) < 2:
        return {}
    samples = max(1, sum(n for _, n, _ in info.mixture))
    tokens = max(1, sum(t for _, _, t in info.mixture))
    return {
        f"mixture/{kind}/{name}": share
        for name, n, t in info.mixture
        for kind, share in (("samples", n / samples), ("tokens", t / tokens))
    }


def _when_ready(metrics: Metrics) -> float:
    """Waits until the devices have finished a step; returns the time."""
    jax.block_until_ready(metrics)
    return time.perf_counter()


class Reporter:
    """Reports steps, one step behind the devices, so that it never waits for them.

    `watcher` runs one thread, which notes when the devices have finished a step.
    """

    def __init__(
        self,
        experiment: Experiment,
        writer: MetricWriter,
        workdir: epath.Path,
        watcher: ThreadPoolExecutor,
    ) -> None:
        self._experiment = experiment
        self._writer = writer
        self._workdir = workdir
        self._watcher = watcher
        self._idle_from: Future[float] | None = None  # when the newest step was finished
        self._idle = 0.0  # seconds since the last report
        self._pending: tuple[int, Metrics, StepInfo, Work] | None = None
        self._since, self._started = time.perf_counter(), False
        self._window: collections.deque[tuple[float, ...]] = collections.deque(maxlen=50)

    def add(
        self,
        step: int,
        metrics: Metrics,
        info: StepInfo,
        work: Work,
        waited: tuple[float, float],
    ) -> None:
        """Takes a step that was just started, and reports the one before it.

        `waited`: the start and the end of the host's wait for the step's batch. The devices wait
        for it only after they have finished the step before.
        """
        start, end = waited
        if self._idle_from is not None:
            start = max(start, self._idle_from.result())
        self._idle += max(0.0, end - start)
        self._idle_from = self._watcher.submit(_when_ready, metrics)
        self.flush()
        self._pending = (step, metrics, info, work)

    def flush(self) -> None:
        """Waits for the pending step and reports it; raises TrainingError on too many skips."""
        if self._pending is None:
            return
        (step, metrics, info, work), self._pending = self._pending, None
        values = {name: float(v) for name, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        if self._started:  # the first step's time is the compiler's
            self._window.append((seconds, self._idle, values["tokens"], values["patches"]))
        self._started, self._idle = True, 0.0
        span, idle, tokens, patches = map(sum, zip((0.0,) * 4, *self._window, strict=True))
        span = span or math.inf
        # Only the host counts windows and samples, and it sees only its own share of them.
        share = work.tokens / max(1, values["tokens"])
        flops = train_flops(self._experiment.model, work, self._experiment.optimizer.train)
        values |= {
            "tokens_per_second": tokens / span,
            "patches_per_second": patches / span,
            "data_wait_share": idle / span,
            "step_seconds": seconds,
            "model_flops_per_second": flops / max(share, 1e-9) / seconds,
            **_counts(info),
        }
        self._writer.write(step, values)
        if values["skipped_in_a_row"] > 0:
            self._skipped(step, values, info)

    def _skipped(self, step: int, values: dict[str, float], info: StepInfo) -> None:
        folder = self._workdir / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{step}_process_{jax.process_index()}.json"
        report = {"step": step, "sample_ids": info.sample_ids, **values}
        write_file(path, json_line(report).encode())
        self._writer.note(f"Step {step} was not finite and was skipped; its samples: {path}")
        if values["skipped_in_a_row"] >= self._experiment.max_skipped_in_a_row:
            raise TrainingError(
                f"{int(values['skipped_in_a_row'])} steps in a row had a loss or gradient that is "
                f"not finite (max_skipped_in_a_row); their samples are listed in {folder}."
            )
