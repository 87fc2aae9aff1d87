"""Trains a model: python -m ov2_jax.train --config=configs/quickstart.py --config.workdir=DIR

Every field of the config can be overridden, e.g. --config.optimizer.learning_rate=2e-5. If the work
directory has checkpoints, the run resumes from the newest one, bit-exactly. SIGTERM saves a
checkpoint and ends with status 75: not done, run the same command again. A config that cannot work
is reported before the accelerator is used.
"""

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import jax

from ov2_jax.config.build import experiment_from, experiment_to_dict
from ov2_jax.config.experiment import Experiment
from ov2_jax.config.start import tokenizer_folder, with_checkpoint_model
from ov2_jax.core.checkpoint_dir import absolute
from ov2_jax.core.errors import UserError
from ov2_jax.core.exit_codes import BROKEN, INTERRUPTED
from ov2_jax.core.files import write_json
from ov2_jax.core.program import Given, run, sentence
from ov2_jax.data.encoding.tokenizer import load_tokenizer
from ov2_jax.data.loader.loader import make_loader
from ov2_jax.model.attention import first_working
from ov2_jax.sharding.mesh import make_mesh
from ov2_jax.training.checkpoint import RunCheckpoints, latest_step
from ov2_jax.training.export import write_hf_folder
from ov2_jax.training.feed import make_feed, to_devices
from ov2_jax.training.hosts.compilation_cache import use_compilation_cache
from ov2_jax.training.hosts.distributed import StopSignal, join
from ov2_jax.training.hosts.host_memory import keep_freed_memory
from ov2_jax.training.monitoring.flops import batch_work
from ov2_jax.training.monitoring.health import Health
from ov2_jax.training.monitoring.metrics import MetricWriter
from ov2_jax.training.monitoring.profile import Profiler
from ov2_jax.training.monitoring.reporter import Reporter
from ov2_jax.training.program import jit_train_step
from ov2_jax.training.start import abstract_train_state, first_state


def train(experiment: Experiment) -> int:
    """Runs or resumes an experiment; returns the last step taken."""
    with contextlib.ExitStack() as stack:
        return _train(experiment, stack)


def _train(experiment: Experiment, stack: contextlib.ExitStack) -> int:
    stop = stack.enter_context(StopSignal())
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    first_process = jax.process_index() == 0
    mesh = make_mesh(experiment.mesh)
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
        write_json(workdir / "config.json", config)

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
    writer.note(f"{'Resuming' if step else 'Starting'} at step {step} on {axes}")
    writer.note(f"Attention kernel: {kernel}; remat: {experiment.compute.remat}")
    for note in (*notes, *kernel_notes):
        writer.note(note)

    # An implicit transfer would stall the devices at every step, so it is an error.
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
        writer.note(f"Stopped by SIGTERM; step {step} is saved. Run the same command to go on.")
    return step


def _end_if_distributed(error: str, status: int) -> None:
    """Ends this process at once if it is one of several. At an ordinary exit JAX would wait for the
    others, which wait for this one in a collective, until they time out after minutes."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        print(error, file=sys.stderr, flush=True)
        os._exit(status)


def main(given: Given) -> int:
    try:
        experiment = experiment_from(given.config)
        if experiment.distributed:
            join()
        use_compilation_cache(experiment.workdir)
        done = train(experiment) == experiment.steps
    except UserError as e:
        _end_if_distributed(sentence(e), 1)
        raise
    except Exception:
        _end_if_distributed(traceback.format_exc(), BROKEN)
        raise
    return 0 if done else INTERRUPTED


if __name__ == "__main__":
    run(main, lambda: None, config=True)
