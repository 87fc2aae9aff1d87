"""Whole runs: interrupted and resumed, moved to other meshes, from broken checkpoints."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from ml_collections import ConfigDict

from conversion import from_hf, to_hf
from ov2_jax.config.build import experiment_from
from ov2_jax.core.errors import CheckpointError, ConfigError
from ov2_jax.core.exit_codes import INTERRUPTED
from ov2_jax.data.loader.step import StepInfo
from ov2_jax.generation.load import open_checkpoint
from ov2_jax.train import train
from ov2_jax.training.monitoring.flops import Work
from ov2_jax.training.monitoring.metrics import MetricWriter
from ov2_jax.training.monitoring.reporter import Reporter, TrainingError
from tests.data.files import Bucket, fill_bucket
from tests.programs import PATIENCE, REPOSITORY, Program
from tests.tiny import SMALL_RUN, config_of, run

# A restore that fails leaves futures that nobody asks for their result.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == sorted({x["step"] for x in lines})
    return {x["step"]: x["loss"] for x in lines}


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a step: parameters, moments, counters."""
    found = {}
    for item in ("params", "train_state"):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore(workdir / "checkpoints" / str(step) / item)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


# The training program, which sends itself a signal after a step, once a path exists: the machine's
# speed makes no difference.
SIGNALLED = """
import os, pathlib, runpy, sys, time
from ov2_jax.training.monitoring.health import Health

(signal, step), path = map(int, sys.argv[1:3]), pathlib.Path(sys.argv[3])
del sys.argv[1:4]
beat = Health.beat

def beat_and_signal(self, at):
    beat(self, at)
    if at == step:
        while not path.exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal)

Health.beat = beat_and_signal
runpy.run_module("ov2_jax.train", run_name="__main__")
"""


def start(
    workdir: Path,
    data: Path,
    changes: dict,
    environment: dict,
    log: Path,
    program: tuple[str, ...] = ("-m", "ov2_jax.train"),
) -> Program:
    """The training program in a process of its own."""
    sources = repr(({"path": str(data)},))
    command = [sys.executable, *program, "--config=configs/quickstart.py"]
    command += [f"--config.workdir={workdir}", f"--config.data.sources={sources}"]
    command += [f"--config.{name}={value}" for name, value in {**SMALL_RUN, **changes}.items()]
    return Program(command, log, {**os.environ, **environment})


class TestInterrupted:
    """One straight run against one that was asked to stop, killed, and resumed twice."""

    STEPS = 60

    def start(
        self, workdir: Path, data: Path, number: int = 0, step: int = 0, path: Path = Path()
    ) -> Program:
        """With a signal's `number`: it is sent after `step`, once `path` exists."""
        changes = {"steps": self.STEPS, "checkpoint.every": 20, "checkpoint.keep_last": 9}
        program = ("-c", SIGNALLED, str(int(number)), str(step), str(path))
        program = program if number else ("-m", "ov2_jax.train")
        log = workdir.with_suffix(".log")
        return start(workdir, data, changes, {"XLA_FLAGS": ""}, log, program)

    @pytest.mark.long
    def test_resume_is_exact(self, tmp_path, data):
        straight, broken = tmp_path / "straight", tmp_path / "broken"
        with self.start(straight, data) as program:
            program.end()

        with self.start(broken, data, signal.SIGTERM, 7) as program:
            assert "Run the same command to go on" in program.end(INTERRUPTED)
        assert [p.name for p in (broken / "checkpoints").iterdir()] == ["7"]
        assert max(losses(broken)) == 7

        with self.start(broken, data, signal.SIGKILL, 45, broken / "checkpoints/40") as program:
            program.end(-signal.SIGKILL)
        assert not (broken / "checkpoints/60").exists()

        with self.start(broken, data) as program:
            assert "Resuming at step 40" in program.end()
        assert losses(broken) == losses(straight)
        want, got = arrays(straight, self.STEPS), arrays(broken, self.STEPS)
        assert want.keys() == got.keys() and len(want) > 60
        for name in want:
            assert want[name].tobytes() == got[name].tobytes(), name


@pytest.mark.long
def test_two_processes_make_one_run(tmp_path, data):
    """Four devices each, as Slurm would start them; tests/launch/test_local.py resumes some."""
    slurm = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "SLURM_JOB_ID": str(os.getpid()),  # the coordinator's port is made of it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    changes = {"distributed": True, "steps": 4, "checkpoint.every": 2}
    with contextlib.ExitStack() as stack:
        programs = [
            stack.enter_context(
                start(
                    tmp_path / "run",
                    data,
                    changes,
                    {**slurm, "SLURM_PROCID": n, "SLURM_LOCALID": n},
                    tmp_path / f"{n}.log",
                )
            )
            for n in ("0", "1")
        ]
        logs = [program.end() for program in programs]
    assert "Starting at step 0 on fsdp 8" in logs[0]
    got = losses(tmp_path / "run")
    assert list(got) == [1, 2, 3, 4] and all(np.isfinite(list(got.values())))
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["tokens"] > 1.5 * line["utilisation/tokens"] * 4 * 128  # counted over both


@pytest.mark.long
def test_a_run_moves_to_another_mesh(tmp_path, data):
    shapes = [{"mesh.data": 1, "mesh.fsdp": -1}, {"mesh.data": -1, "mesh.fsdp": 2}]
    run(tmp_path / "one", data, steps=4, **shapes[0])
    run(tmp_path / "two", data, steps=4, **{"checkpoint.every": 2}, **shapes[0])
    shutil.rmtree(tmp_path / "two/checkpoints/4")
    assert run(tmp_path / "two", data, steps=4, grad_accum=1, **shapes[1]) == 4
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two) == [1, 2, 3, 4]
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    want, got = arrays(tmp_path / "one", 4), arrays(tmp_path / "two", 4)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("lost", ["params/d", "params/manifest.ocdbt", "train_state", "loader"])
def test_a_partial_checkpoint_is_refused(tmp_path, data, finished, lost):
    workdir = tmp_path / "partial"
    shutil.copytree(finished, workdir)
    path = workdir / "checkpoints/2" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match="step 2"):
        run(workdir, data, steps=3)
    assert max(losses(workdir)) == 2


def test_a_checkpoint_of_another_model_is_refused(tmp_path, data, finished):
    workdir = tmp_path / "other"
    shutil.copytree(finished, workdir)
    with pytest.raises(ConfigError, match="intermediate_size is 96"):
        run(workdir, data, steps=3, **{"model.text.intermediate_size": 96})


def test_a_checkpoint_with_other_arrays_is_one_sentence(tmp_path, data, finished):
    workdir = tmp_path / "other"
    shutil.copytree(finished, workdir)
    folder = workdir / "checkpoints/2/train_state"
    with pytest.raises(
        CheckpointError, match=r"it has opt_state\.1\.mu\.decoder.* more; "
    ) as error:
        run(workdir, data, steps=3, **{"optimizer.train": ("merger",)})
    assert "init_from starts a new run" in str(error.value) and "\n" not in str(error.value)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(folder)
        shutil.rmtree(folder)
        checkpointer.save(folder, {**tree, "rng": np.zeros(2, np.uint32)})
    with pytest.raises(CheckpointError, match="optimizer: it has rng; init_from starts"):
        run(workdir, data, steps=3)


def test_a_start_from_a_run_has_its_parameters_and_a_fresh_optimizer(tmp_path, data, finished):
    changes = {"init_from": str(finished), "tokenizer": None}
    run(tmp_path / "next", data, steps=1, **changes, **{"optimizer.train": ("merger",)})
    before, after = arrays(finished, 2), arrays(tmp_path / "next", 1)
    for name in before:
        if name.startswith("params") and "merger" not in name:
            assert before[name].tobytes() == after[name].tobytes(), name
    assert not any("encoder" in name for name in after if name.startswith("train_state"))


@pytest.mark.long
def test_relative_paths_work_everywhere(tmp_path, data, monkeypatch):
    """Train, start from it, export, convert back, open each: all below the current folder."""
    monkeypatch.chdir(tmp_path)
    run(Path("run"), data, steps=1)
    run(Path("next"), data, steps=1, init_from="run", tokenizer=None)
    to_hf.convert("run", "hf")
    from_hf.convert("hf", "converted")
    run(Path("third"), data, steps=1, init_from="converted", tokenizer=None)
    assert losses(tmp_path / "next") == losses(tmp_path / "third")
    for folder in ("run", "run/checkpoints/1", "hf", "converted"):
        assert open_checkpoint(folder).data.max_pixels == 8 * 28 * 28


def test_a_start_from_another_size_names_the_fields(tmp_path, data, finished):
    changes = {"init_from": str(finished), "model.text.intermediate_size": 96}
    with pytest.raises(ConfigError, match=r"model\.text\.intermediate_size is 96, the.* 512"):
        run(tmp_path / "next", data, steps=1, **changes)


def test_constants_are_the_checkpoints(tmp_path, data, finished, capsys):
    """A config that has another theta does not change the model, and is told so."""
    run(tmp_path / "same", data, steps=1, init_from=str(finished), tokenizer=None)
    changes = {"init_from": str(finished), "tokenizer": None, "model.text.rope_theta": 5e6}
    run(tmp_path / "next", data, steps=1, **changes)
    assert "model.text.rope_theta is 1000000.0 as in the checkpoint, not 5000000.0." in (
        capsys.readouterr().err
    )
    assert losses(tmp_path / "next") == losses(tmp_path / "same")


def test_a_run_resumes_without_what_it_started_from(tmp_path, data, finished):
    start = tmp_path / "start"
    shutil.copytree(finished, start)
    changes = {"init_from": str(start), "tokenizer": None, "optimizer.train": ("merger",)}
    run(tmp_path / "next", data, steps=1, **changes)
    shutil.rmtree(start)
    assert run(tmp_path / "next", data, steps=2, **changes) == 2
    with pytest.raises(ConfigError, match="start', which does not exist"):
        run(tmp_path / "other", data, steps=2, **changes)


@pytest.mark.long
def test_a_diverging_run_stops_and_names_its_samples(tmp_path, data):
    changes = {"optimizer.learning_rate": 1e30, "max_skipped_in_a_row": 2}
    with pytest.raises(TrainingError, match="2 steps in a row"):
        run(tmp_path / "diverging", data, steps=20, **changes)
    reports = sorted((tmp_path / "diverging/nonfinite").iterdir())
    assert len(reports) == 2
    report = json.loads(reports[0].read_text())
    samples = [name for pack in report["sample_ids"] for name in pack]
    assert report["step"] > 1 and samples and all(s.startswith("train-") for s in samples)


def test_metrics_say_what_a_step_did(finished):
    line = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("loss", "grad_norm/encoder", "learning_rate/merger", "tokens_per_second"):
        assert np.isfinite(line[name])
    assert 0.5 < line["utilisation/tokens"] <= 1 and 0.3 < line["utilisation/patches"] <= 1
    assert line["data/seen"] >= line["samples"] > 0 and line["model_flops_per_second"] > 0
    assert line["data/dropped_rounds"] == line["data/uniform_fallbacks"] == 0
    assert 0 <= line["data_wait_share"] <= 1
    assert list((finished / "tensorboard").iterdir())


class _AtOnce(ThreadPoolExecutor):
    """Runs what it is given before `submit` returns."""

    def submit(self, run, *args):
        future = Future()
        future.set_result(run(*args))
        return future


class _Clock:
    """The time of a run, which passes by a second in a step of the devices and in reading a file.

    Files are read one by one, and only while the loop waits for a batch, so that the loader cannot
    get ahead however long the machine takes for a step.
    """

    def __init__(self, monkeypatch, steps: int) -> None:
        self._now, self._looks, self._last_look = 100.0, 0, 2 * steps
        self._waiting, self._one_by_one = threading.Event(), threading.Lock()
        loop, reporter = sys.modules[train.__module__], sys.modules[Reporter.__module__]
        monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=self._look))
        monkeypatch.setattr(reporter, "time", SimpleNamespace(perf_counter=lambda: self._now))
        monkeypatch.setattr(loop, "ThreadPoolExecutor", _AtOnce)
        make = loop.jit_train_step
        monkeypatch.setattr(loop, "jit_train_step", lambda *args: self._timed(make(*args)))

    def _look(self) -> float:
        """The loop looks before and after it waits for a batch."""
        self._looks += 1
        if self._looks % 2 or self._looks == self._last_look:
            self._waiting.set()
        else:
            self._waiting.clear()
        return self._now

    def _timed(self, step):
        def run(state, batch):
            result = jax.block_until_ready(step(state, batch))
            self._now += 1
            return result

        return run

    def read_a_file(self) -> None:
        with self._one_by_one:
            assert self._waiting.wait(PATIENCE)
            self._now += 1


@pytest.mark.long
def test_slow_files_are_seen_as_time_spent_waiting_for_data(tmp_path, data, capsys, monkeypatch):
    """Slow from the first step on: what was read before that lasts for two or three more."""
    metrics = tmp_path / "run/metrics.jsonl"
    clock = _Clock(monkeypatch, steps=8)

    def wait() -> None:
        if metrics.exists() and metrics.stat().st_size > 0:
            clock.read_a_file()

    media = [path for path in data.parent.rglob("*") if path.is_file()]
    fill_bucket({f"data/{p.relative_to(data.parent)}": p.read_bytes() for p in media})
    monkeypatch.setattr(Bucket, "before_read", staticmethod(wait))
    sources = ({"path": str(data), "root": "s3://data"},)
    run(tmp_path / "run", data, steps=8, **{"data.sources": sources})
    shares = [json.loads(line)["data_wait_share"] for line in metrics.read_text().splitlines()]
    assert shares[0] == 0  # the first step's time is the compiler's
    assert 0.5 < shares[-1] <= 1, shares
    assert f"waits for data {shares[-1]:.0%}" in capsys.readouterr().err


def test_waiting_counts_only_while_the_devices_have_nothing_to_do(tmp_path, data, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr(sys.modules[Reporter.__module__], "time", fake)
    experiment = experiment_from(config_of(tmp_path, data))
    info = StepInfo(*[0] * len(StepInfo._fields))
    info = info._replace(token_slots=1, class_patches=(), class_slots=(), mixture=())
    names = ("loss", "tokens", "patches", "skipped_in_a_row")
    options = {"steps": 9, "start": 0, "config": {}, "wandb_project": None, "active": True}
    where = epath.Path(tmp_path)
    with MetricWriter(where, **options) as writer, ThreadPoolExecutor(1) as watcher:
        reporter = Reporter(experiment, writer, where, watcher)

        def step(number: int, start: float, end: float) -> None:
            """A step that is through at once; the wait for it started and ended so long ago."""
            clock.now += 0.2
            metrics = jax.block_until_ready(jax.device_put(dict.fromkeys(names, np.float32(0))))
            waited = clock.now - start, clock.now - end
            reporter.add(number, metrics, info, Work(1, 0, 0, 0), waited)
            watcher.submit(int).result()  # after it has noted when the step was through

        step(1, 10, 0)  # before the first step, when the clock does not run yet
        step(2, 10, 5)  # over before step 1 was through
        step(3, 10, 0)  # counts from when step 2 was through, 0.2 s
        step(4, 10, 5)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line)["data_wait_share"] for line in lines]
    assert shares == pytest.approx([0, 1, 0.5])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"global_rows": 12}, "12 packs of pack.rows 1, which grad_accum 1 x 8 data shards"),
        ({"pack.rows": 3}, "global_rows 8 is not a multiple of pack.rows 3"),
        ({"mesh.data": 3}, "does not use the 8 devices"),
        ({"steps": 0}, "steps is 0"),
        ({"tokenizer": "no/such/folder"}, "tokenizer is 'no/such/folder', which does not exist"),
        ({"init_from": "no/such/folder"}, "init_from is 'no/such/folder', which does not exist"),
        ({"workdir": ""}, "workdir is empty"),
        ({"workdir": "gs://bucket/run"}, "mount the bucket"),
        ({"loss_reduction": "mean"}, "loss_reduction is 'mean'"),
        ({"checkpoint.keep_every": 30}, "must be a multiple of checkpoint.every"),
        ({"compute.dtype": "float16"}, "compute.dtype is 'float16'"),
    ],
)
def test_a_config_that_cannot_work_is_one_sentence(tmp_path, data, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        train(experiment_from(config_of(tmp_path / "run", data, **changes)))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/checkpoints").exists()


def test_unknown_fields_and_wrong_types_are_named(tmp_path, data):
    config = config_of(tmp_path, data).to_dict()
    with pytest.raises(ConfigError, match="optimizer has no field lr; it has .*learning_rate"):
        experiment_from(ConfigDict({**config, "optimizer": {"lr": 1.0}}))
    with pytest.raises(ConfigError, match="steps is 'many'; it must be of type int"):
        experiment_from(ConfigDict({**config, "steps": "many"}))
    del config["global_rows"]
    with pytest.raises(ConfigError, match="config lacks global_rows"):
        experiment_from(ConfigDict(config))


def test_an_override_of_no_field_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "ov2_jax.train", "--config=configs/quickstart.py"]
    command += [f"--config.workdir={tmp_path}", "--config.optimizer.lr=1"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "--config.optimizer.lr=1 names no field" in result.stderr.splitlines()[-1]
