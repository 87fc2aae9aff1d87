"""Heartbeat and watchdog: a step that is slow leaves stacks, and a run goes on."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from etils import epath

from ov2_jax.training.monitoring import health
from ov2_jax.training.monitoring.health import Health
from tests.programs import PATIENCE, REPOSITORY

# The slow step waits in C, without releasing the interpreter lock, until something is written into
# the file of stacks. Whoever needs the lock to write there never does, and the wait ends unheeded.
_HANGS = """
import ctypes, pathlib, sys
from etils import epath
from ov2_jax.training.monitoring import health

IN_MODIFY, POLLIN = 2, 1
libc = ctypes.PyDLL(None)  # whose calls keep the interpreter lock

class PollFd(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short)]

def slow_part(stacks):
    watch = libc.inotify_init()
    assert libc.inotify_add_watch(watch, str(stacks).encode(), IN_MODIFY) >= 0
    written = libc.poll(ctypes.byref(PollFd(watch, POLLIN, 0)), 1, 1000 * int(sys.argv[2]))
    assert written == 1, "no stacks were written while the interpreter lock was held"
    while "in slow_part" not in stacks.read_text():
        pass  # the first line is there, and the others follow

health._LEAST_LIMIT = 1.0
folder = pathlib.Path(sys.argv[1])
with health.Health(epath.Path(folder), 3) as watched:
    for step in range(1, 5):
        if step == 4:
            slow_part(folder / "stacks/process_00003.txt")
        watched.beat(step)
"""


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """What time it is for the watchdog."""
    found = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(perf_counter=lambda: found.now, time=time.time)
    monkeypatch.setattr(health, "time", fake)
    return found


def test_a_run_has_a_heartbeat_and_no_stacks(finished):
    beat = json.loads((finished / "heartbeat/process_00000.json").read_text())
    assert beat["step"] == 2 and beat["pid"] == os.getpid()
    began = psutil.Process().create_time()
    assert began < beat["time"] < time.time() and 0 < beat["step_seconds"] < time.time() - began
    assert not list((finished / "stacks").iterdir())


def test_the_heartbeat_is_written_once_a_second_and_at_the_end(tmp_path, clock):
    path, written = tmp_path / "heartbeat/process_00007.json", []
    with Health(epath.Path(tmp_path), 7) as watched:
        for step in range(1, 21):
            clock.now += 0.3
            watched.beat(step)
            written.append(json.loads(path.read_text())["step"])
    assert sorted(set(written)) == [1, 5, 9, 13, 17]
    assert json.loads(path.read_text())["step"] == 20
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_stacks_of_a_step_that_holds_the_interpreter(tmp_path):
    command = [sys.executable, "-c", _HANGS, str(tmp_path), str(int(PATIENCE))]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    stacks = (tmp_path / "stacks/process_00003.txt").read_text()
    assert stacks.count("most recent call first") >= 1 and "in slow_part" in stacks
    assert "Above: before step 4, reached after" in stacks
    assert "Step 4 came after" in result.stderr and "process_00003.txt" in result.stderr


def test_stacks_before_there_is_a_first_step(tmp_path, monkeypatch):
    stacks, end = tmp_path / "stacks/process_00000.txt", time.monotonic() + PATIENCE
    monkeypatch.setattr(health, "_FIRST_LIMIT", 0.2)
    with Health(epath.Path(tmp_path), 0) as watched:
        while "most recent call first" not in stacks.read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        watched.beat(1)
    assert "Above: before step 1" in stacks.read_text()


def test_only_the_step_after_the_stacks_is_named(tmp_path, clock, monkeypatch, capsys):
    files = []
    later = f"{health.__name__}.faulthandler.dump_traceback_later"
    monkeypatch.setattr(later, lambda seconds, file: files.append(file))
    with Health(epath.Path(tmp_path), 0) as watched:
        for step in range(1, 6):
            if step == 4:
                print("stacks", file=files[-1], flush=True)
            clock.now += 7.0
            watched.beat(step)
    stacks = tmp_path / "stacks/process_00000.txt"
    assert stacks.read_text() == "stacks\nAbove: before step 4, reached after 7.0 s.\n"
    error = f"Step 4 came after 7.0 s; the threads' stacks are in {stacks}.\n"
    assert capsys.readouterr().err == error


def test_the_limit_is_ten_times_the_median(tmp_path, clock, monkeypatch):
    limits = []
    later = f"{health.__name__}.faulthandler.dump_traceback_later"
    monkeypatch.setattr(later, lambda seconds, file: limits.append(seconds))
    with Health(epath.Path(tmp_path), 0) as watched:
        for step, seconds in enumerate((900, 5, 7, 90, 7, 7), 1):
            clock.now += seconds
            watched.beat(step)
    assert limits == [1800, 1800, 60, 60, 70, 70, 70]  # the first is no step; 60 is the least
