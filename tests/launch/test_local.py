"""Jobs of several processes on one machine: how they end, and that they equal a run of one."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console

from launch.errors import LaunchError
from launch.local import process_environment
from ov2_jax.config.build import experiment_from
from ov2_jax.core.exit_codes import INTERRUPTED
from ov2_jax.data.prepare.job import PrepareJob
from ov2_jax.data.prepare.run import prepare
from ov2_jax.data.prepare.runners import ProcessRunner
from tests.programs import PATIENCE, REPOSITORY, Program
from tests.tiny import SMALL_RUN, config_of, run

STEPS = 24
ROWS = {"pack.vision_rows": ((8, 64),)}  # which 8 devices can share
# Seconds until a job ends after its first failure. The launcher takes five; after 100 seconds JAX
# would end the other processes by itself.
ENDED_BY_LAUNCHER = 90


@pytest.fixture(scope="module")
def plan(tmp_path_factory, data) -> Path:
    root = tmp_path_factory.mktemp("plan")
    e = experiment_from(config_of(root / "unused", data, **ROWS))
    job = PrepareJob(e.data, e.pack, e.model, e.tokenizer, seed=e.seed, out=str(root / "plan"))
    with ProcessRunner(1) as processes:
        prepare(job, processes, console=Console(file=io.StringIO()))
    return root / "plan"


def changes(plan: Path) -> dict:
    return {"steps": STEPS, "checkpoint.every": 4, "data.plan": str(plan), **ROWS}


def launched(
    workdir: Path, data: Path, plan: Path, *, processes: int, devices: int, **mesh: int
) -> Program:
    """launch.local in a process of its own; its log is WORKDIR.log."""
    values = {"data.sources": ({"path": str(data)},), **SMALL_RUN, **changes(plan)}
    values |= {f"mesh.{axis}": size for axis, size in mesh.items()}
    command = [sys.executable, "-m", "launch.local", f"--processes={processes}"]
    command += [f"--devices-per-process={devices}", "--", "--config=configs/quickstart.py"]
    command += [f"--config.workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in values.items()]
    # Without the cache that tests share, so that the run uses its own.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return Program(command, workdir.with_suffix(".log"), environment)


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x["loss"] for x in lines}


@pytest.mark.long
def test_killed_stopped_and_resumed_it_is_the_run_of_one_process(tmp_path, data, plan, capsys):
    one, many = tmp_path / "one", tmp_path / "many"
    run(one, data, **changes(plan))
    capsys.readouterr()

    with launched(many, data, plan, processes=2, devices=4) as job:
        job.until((many / "checkpoints/4").exists)
        beat = json.loads((many / "heartbeat/process_00001.json").read_text())
        os.kill(beat["pid"], signal.SIGKILL)
        output = job.end(1, seconds=ENDED_BY_LAUNCHER)
    assert "Starting at step 0 on fsdp 8" in output
    assert "launch.local: Process 1 was ended by SIGKILL (status 137), so the job was" in output
    assert (many / "compilation_cache").exists()

    # Now every pack is spread over both processes: each reads all of them.
    with launched(many, data, plan, processes=2, devices=4, fsdp=1, context=8) as job:
        job.until(lambda: "Resuming at step" in job.said())
        job.signal(signal.SIGTERM)
        output = job.end(INTERRUPTED)
    assert "launch.local: SIGTERM: all processes are asked to save and stop." in output
    (line,) = (x for x in output.splitlines() if "Stopped by SIGTERM" in x)
    stopped = max(int(p.name) for p in (many / "checkpoints").iterdir())
    assert line.startswith("[0] ") and f"step {stopped} is saved" in line
    assert stopped < STEPS and max(losses(many)) == stopped

    run(many, data, **changes(plan))
    assert f"Resuming at step {stopped}" in capsys.readouterr().err
    want, got = losses(one), losses(many)
    assert list(got) == list(want) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)


@pytest.mark.long
def test_an_error_in_one_process_ends_all(tmp_path, data, plan):
    """The others wait for it in a collective, so the launcher ends them."""
    workdir = tmp_path / "run"
    (workdir / "heartbeat/process_00001.json").mkdir(parents=True)
    with launched(workdir, data, plan, processes=2, devices=4) as job:
        job.until(lambda: "IsADirectoryError" in job.said())
        output = job.end(1, seconds=ENDED_BY_LAUNCHER)
    sentence = output[output.index("launch.local: Process 1 ended with status 70") :]
    assert re.search(r"\n    IsADirectoryError: .*process_00001\.json", sentence)


# --- without training -----------------------------------------------------------------------------
# These programs never end by themselves, so that any limit of time shows whether they are ended.

_PROGRAM = """
import os, signal, subprocess, sys, time
from launch.local import run_processes
command = [sys.executable, "-c", sys.argv[1]]
sys.exit(run_processes(command, [{**os.environ, "RANK": str(rank)} for rank in range(2)]))
"""
_SLEEP = "while True: time.sleep(1)\n"


def start(program: str) -> subprocess.Popen:
    lines = "import os, signal, subprocess, sys, time\nrank = os.environ['RANK']\n" + program
    command = [sys.executable, "-c", _PROGRAM, lines]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def alive(pid: int) -> bool:
    """Whether a process runs. An orphan that nobody collects stays a zombie: it does not run."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def members(group: int) -> list[int]:
    """The processes of a process group."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            found += [pid] if os.getpgid(pid) == group else []
    return found


def until(condition: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.01)


@pytest.mark.parametrize(
    "program, status",
    [
        ("", 0),
        ("sys.exit(75)", INTERRUPTED),
        ("sys.exit(75 if rank == '1' else 0)", INTERRUPTED),
        ("sys.exit(3 if rank == '1' else 0)", 1),
    ],
)
def test_statuses(program, status):
    process = start(program)
    output = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == status, output
    assert ("Process 1 ended with status 3" in output) == (status == 1)


def test_a_process_that_does_not_listen_is_killed(tmp_path):
    """Rank 0 and its child ignore SIGTERM; rank 1 fails once they do."""
    path = tmp_path / "group"
    process = start(
        "if rank == '1':\n"
        f"    while not os.path.exists({str(path)!r}): time.sleep(0.01)\n"
        "    print('what went wrong'); sys.exit(4)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', 'infinity'])\n"
        f"open({str(tmp_path / 'part')!r}, 'w').write(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'part')!r}, {str(path)!r})\n"
        "child.wait()\n"
    )
    output = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1
    assert "Process 1 ended with status 4, so the job" in output
    assert output.count("[1] what went wrong") == 1 and "\n    what went wrong\n" in output
    group = int(path.read_text())
    until(lambda: not any(map(alive, members(group))), "a process outlived its launcher")


def test_a_second_signal_kills():
    process = start(
        "signal.signal(signal.SIGTERM, lambda *_: print('saving', flush=True))\n"
        "print('ready', flush=True)\n" + _SLEEP
    )
    lines = iter(process.stderr.readline, "")
    seen = 0
    for word, number in (("ready", signal.SIGINT), ("saving", signal.SIGTERM)):
        seen = sum(1 for _, line in zip(range(2), (x for x in lines if word in x), strict=False))
        assert seen == 2
        process.send_signal(number)
    rest = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1 and "Asked again to stop" in rest


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_a_killed_launcher_leaves_nothing_behind():
    process = start("print(os.getpid(), flush=True)\n" + _SLEEP)
    pids = [int(process.stderr.readline().split()[1]) for _ in range(2)]
    process.kill()
    process.wait()
    process.stderr.close()
    until(lambda: not any(map(alive, pids)), "a process outlived its launcher")


def test_each_process_gets_its_own_devices():
    def of(rank: int, platform: str, **base: str) -> dict[str, str]:
        return process_environment(
            rank, processes=2, devices=2, platform=platform, port=9, base={"HOME": "/h", **base}
        )

    cpu = of(1, "cpu", XLA_FLAGS="--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2")
    assert cpu["XLA_FLAGS"].split() == [
        "--xla_a=1",
        "--xla_b=2",
        "--xla_force_host_platform_device_count=2",
    ]
    assert cpu["JAX_PLATFORMS"] == "cpu" and cpu["HOME"] == "/h"
    assert (cpu["JAX_PROCESS_ID"], cpu["JAX_NUM_PROCESSES"]) == ("1", "2")
    assert [of(rank, "cuda")["CUDA_VISIBLE_DEVICES"] for rank in (0, 1)] == ["0,1", "2,3"]
    assert of(1, "cuda", CUDA_VISIBLE_DEVICES="4,5,6,7")["CUDA_VISIBLE_DEVICES"] == "6,7"
    with pytest.raises(LaunchError, match="need 4 GPUs, but CUDA_VISIBLE_DEVICES names 3"):
        of(0, "cuda", CUDA_VISIBLE_DEVICES="0,1,2")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--processes=2",), "LaunchError: there are no arguments for ov2_jax.train; write them"),
        (("--processes=0", "--", "--config=x"), "flag --processes=0"),
        (("--platform=tpu", "--", "--config=x"), "flag --platform=tpu"),
    ],
)
def test_a_wrong_command_line_is_an_error(arguments, message):
    command = [sys.executable, "-m", "launch.local", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 1 and message in result.stdout + result.stderr
