"""Heartbeat and watchdog: a step that is slow leaves stacks, and a run goes on."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from etils import epath

from ov2_jax.training.monitoring import health
from ov2_jax.training.monitoring.health import Health
from tests.programs import PATIENCE, REPOSITORY

_HANGS = """
import re, sys, threading
from etils import epath
from ov2_jax.training.health import Health

def slow_part():
    # A search that backtracks for seconds in C, and gives the interpreter lock to nobody.
    re.match("(a+)+$", "a" * 26 + "b")

with Health(epath.Path(sys.argv[1]), 3, least=1.0) as health:
    for step in range(1, 6):
        if step == 4:
            slow_part()
        health.beat(step)
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
    assert 0 < beat["step_seconds"] < 600 and abs(time.time() - beat["time"]) < 3600
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
    command = [sys.executable, "-c", _HANGS, str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    stacks = (tmp_path / "stacks/process_00003.txt").read_text()
    assert stacks.count("most recent call first") >= 1 and "in slow_part" in stacks
    assert "Above: before step 4, reached after" in stacks and "step 5" not in stacks
    assert "Step 4 came after" in result.stderr and "process_00003.txt" in result.stderr


def test_stacks_before_there_is_a_first_step(tmp_path):
    stacks, end = tmp_path / "stacks/process_00000.txt", time.monotonic() + PATIENCE
    with Health(epath.Path(tmp_path), 0, first=0.2) as watched:
        while "most recent call first" not in stacks.read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        watched.beat(1)
    assert "Above: before step 1" in stacks.read_text()


def test_the_limit_is_ten_times_the_median(tmp_path, clock, monkeypatch):
    limits = []
    later = f"{health.__name__}.faulthandler.dump_traceback_later"
    monkeypatch.setattr(later, lambda seconds, file: limits.append(seconds))
    with Health(epath.Path(tmp_path), 0) as watched:
        for step, seconds in enumerate((900, 5, 7, 90, 7, 7), 1):
            clock.now += seconds
            watched.beat(step)
    assert limits == [1800, 1800, 60, 60, 70, 70, 70]  # the first is no step; 60 is the least
