"""Trains a model: python -m ov2_jax.train --config=configs/quickstart.py --config.workdir=DIR

Every field of the config can be overridden, e.g. --config.optimizer.learning_rate=2e-5. A work
directory that holds checkpoints is resumed from its newest one, bit-exactly. SIGTERM saves a
checkpoint and ends with status 75: not done, run the same command again. Everything a config gets
wrong is said before the accelerator is touched.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from ov2_jax.checkpoint_dir import CheckpointError, absolute
from ov2_jax.data.errors import DataError
from ov2_jax.data.loader import StepInfo, make_loader
from ov2_jax.data.tokenizer import load_tokenizer
from ov2_jax.exit_codes import BROKEN, INTERRUPTED
from ov2_jax.model.attention import first_working
from ov2_jax.model.config import ConfigError
from ov2_jax.sharding import make_mesh
from ov2_jax.training.checkpoint import RunCheckpoints, latest_step
from ov2_jax.training.config import Experiment, experiment_from, experiment_to_dict
from ov2_jax.training.distributed import StopSignal, join
from ov2_jax.training.feed import make_feed, to_devices
from ov2_jax.training.flops import Work, batch_work, train_flops
from ov2_jax.training.health import Health
from ov2_jax.training.host_memory import keep_freed_memory
from ov2_jax.training.metrics import MetricWriter, json_line
from ov2_jax.training.profile import Profiler
from ov2_jax.training.program import jit_train_step
from ov2_jax.training.start import (
    abstract_train_state,
    first_state,
    tokenizer_folder,
    use_compilation_cache,
    with_checkpoint_model,
    write_hf_folder,
)
from ov2_jax.training.step import Metrics

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.")


class TrainingError(RuntimeError):
    """A run that must not go on; its last checkpoint is whole."""


def _counts(info: StepInfo) -> dict[str, float]:
    """Of this process: samples and filled slots of the step, samples set aside since the start."""
    classes = zip(info.class_patches, info.class_slots, strict=True)
    return {
        "samples": info.samples,
        "utilisation/tokens": info.tokens / info.token_slots,
        "utilisation/patches": info.patches / max(1, info.patch_slots),
        **{f"utilisation/patches_class_{k}": n / slots for k, (n, slots) in enumerate(classes)},
        "data/seen": info.seen,
        "data/rejected": info.rejected,
        "data/truncated": info.truncated,
        "data/uniform_fallbacks": info.uniform_fallbacks,
        **_shares(info),
    }


def _shares(info: StepInfo) -> dict[str, float]:
    """Realised shares of samples and tokens since the start, where there are several data sets."""
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
    """Waits until the devices are through with a step; returns the time."""
    jax.block_until_ready(metrics)
    return time.perf_counter()


class Reporter:
    """Turns a step's device metrics and host counts into numbers, one step behind the devices.

    `watcher` runs one thread, which notes when the devices are through with a step.
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
        self._idle_from: Future[float] | None = None  # when the newest step was through
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

        `waited`: from when to when the host waited for the step's batch. That keeps the devices
        waiting only from when they are through with the step before.
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
        # Windows and samples are known on the host, which sees its own share of them only.
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
        path.write_text(json_line(report))
        self._writer.say(f"Step {step} was not finite and was skipped; its samples: {path}")
        if values["skipped_in_a_row"] >= self._experiment.max_skipped_in_a_row:
            raise TrainingError(
                f"{int(values['skipped_in_a_row'])} steps in a row had a loss or gradient that is "
                f"not finite (max_skipped_in_a_row); their samples are listed in {folder}."
            )


def train(experiment: Experiment) -> int:
    """Runs or resumes an experiment; returns the last step taken."""
    with contextlib.ExitStack() as stack:
        return _train(experiment, stack)


def _train(experiment: Experiment, stack: contextlib.ExitStack) -> int:
    stop = stack.enter_context(StopSignal())
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    mesh = make_mesh(experiment.mesh)
    first_process = jax.process_index() == 0
    feed = make_feed(mesh)
    experiment.check_mesh(mesh.shape, feed.count)
    workdir = absolute(experiment.workdir)
    health = stack.enter_context(Health(workdir, jax.process_index()))
    step = latest_step(workdir)
    experiment, notes = with_checkpoint_model(experiment, resuming=step > 0)
    config = experiment_to_dict(experiment)
    tokenizer = load_tokenizer(tokenizer_folder(experiment, resuming=step > 0), experiment.model)
    loader = make_loader(
        experiment.data,
        experiment.pack,
        experiment.model,
        tokenizer,
        packs_per_step=experiment.packs_per_step,
        seed=experiment.seed,
        process_index=feed.index,
        process_count=feed.count,
        rejects_path=workdir / "rejected.jsonl",
    )
    stack.callback(loader.close)
    checkpoints = stack.enter_context(RunCheckpoints(workdir, experiment.checkpoint))
    if step:
        state = checkpoints.restore(step, abstract_train_state(experiment, mesh), loader, feed)
    else:
        if first_process:
            write_hf_folder(experiment)
        state = first_state(experiment, mesh)
    if first_process:
        (workdir / "config.json").write_text(json.dumps(config, indent=2))

    kernel, kernel_notes = first_working(experiment.compute.attention)
    compute = dataclasses.replace(experiment.compute, attention=(kernel,))
    train_step = jit_train_step(dataclasses.replace(experiment, compute=compute), state)
    writer = stack.enter_context(
        MetricWriter(
            workdir,
            steps=experiment.steps,
            start=step,
            config=config,
            wandb_project=experiment.wandb_project,
            active=first_process,
        )
    )
    watcher = stack.enter_context(ThreadPoolExecutor(1))
    profiler = stack.enter_context(Profiler(workdir, experiment.profile_steps))
    axes = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    writer.say(f"{'Resuming' if step else 'Starting'} at step {step} on {axes}")
    writer.say(f"Attention kernel: {kernel}; remat: {experiment.compute.remat}")
    for note in (*notes, *kernel_notes):
        writer.say(note)
    # Transfers that nobody asked for are errors: each would stall the devices at every step.
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        reporter = Reporter(experiment, writer, workdir, watcher)
        while step < experiment.steps:
            asked = time.perf_counter()
            batch, info = next(loader)
            waited = asked, time.perf_counter()
            work = batch_work(batch)
            profiler.before(step + 1)
            # Returns at once: the devices work while the host reports and fetches the next batch.
            state, metrics = train_step(state, to_devices(batch, feed, experiment.grad_accum))
            step += 1
            profiler.after(step, metrics)
            reporter.add(step, metrics, info, work, waited)
            health.beat(step)
            last = step == experiment.steps or stop.asked()
            if last or step % experiment.checkpoint.every == 0:
                reporter.flush()
                checkpoints.save(step, state, loader, config)
            if last:
                break
    if step < experiment.steps:
        writer.say(f"Stopped by SIGTERM; step {step} is saved. Run the same command to go on.")
    return step


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flags, but an override of a field that the config lacks is one sentence."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as e:
        name = str(e).strip("\"'")
        given = [a for a in argv if a.startswith("--config.") and name in a.split("=")[0]]
        raise SystemExit(
            f"ConfigError: {' '.join(given)} names no field of the config ({name!r}); the fields "
            "are those of ov2_jax/training/config.py."
        ) from e


def _end_if_distributed(error: str, status: int) -> None:
    """One of several processes ends at once: at an ordinary exit JAX would wait for the others,
    which wait for it in a collective, until all is lost to a timeout of minutes."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        print(error, file=sys.stderr, flush=True)
        os._exit(status)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells its whole life at INFO
    try:
        experiment = experiment_from(_CONFIG.value)
        if experiment.distributed:
            join()
        use_compilation_cache(experiment.workdir)
        done = train(experiment) == experiment.steps
    except (ConfigError, DataError, CheckpointError, TrainingError) as e:
        _end_if_distributed(f"{type(e).__name__}: {e}", 1)
        raise SystemExit(f"{type(e).__name__}: {e}") from e
    except Exception:
        _end_if_distributed(traceback.format_exc(), BROKEN)
        raise
    if not done:
        raise SystemExit(INTERRUPTED)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
