"""Heartbeat and watchdog: a step that is slow leaves stacks, and a run goes on."""

import json
import os
import subprocess
import sys
import time

import pytest
from etils import epath

from ov2_jax.training.health import Health
from tests.runs import REPOSITORY

_HANGS = """
import re, sys, threading
from etils import epath
from ov2_jax.training.health import Health

def slow_part():
    # A search that backtracks for seconds in C, and gives the interpreter lock to nobody.
    re.match("(a+)+$", "a" * 26 + "b")

with Health(epath.Path(sys.argv[1]), 3, least=0.3) as health:
    for step in range(1, 6):
        if step == 4:
            slow_part()
        health.beat(step)
"""


def test_a_run_has_a_heartbeat_and_no_stacks(finished):
    beat = json.loads((finished / "heartbeat/process_00000.json").read_text())
    assert beat["step"] == 2 and beat["pid"] == os.getpid()
    assert 0 < beat["step_seconds"] < 600 and abs(time.time() - beat["time"]) < 3600
    assert not list((finished / "stacks").iterdir())


def test_the_heartbeat_is_written_now_and_then(tmp_path):
    path = tmp_path / "heartbeat/process_00007.json"
    with Health(epath.Path(tmp_path), 7) as health:
        start = time.perf_counter()
        for step in range(1, 2001):
            health.beat(step)
        assert (time.perf_counter() - start) / 2000 < 2e-3  # a beat costs a step nothing
        assert json.loads(path.read_text())["step"] < 2000
    assert json.loads(path.read_text())["step"] == 2000
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_stacks_of_a_step_that_holds_the_interpreter(tmp_path):
    command = [sys.executable, "-c", _HANGS, str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    stacks = (tmp_path / "stacks/process_00003.txt").read_text()
    assert stacks.count("most recent call first") >= 1 and "in slow_part" in stacks
    assert "Above: before step 4, reached after" in stacks and "step 5" not in stacks
    assert "Step 4 came after" in result.stderr and "process_00003.txt" in result.stderr


def test_stacks_before_there_is_a_first_step(tmp_path):
    with Health(epath.Path(tmp_path), 0, first=0.2) as health:
        time.sleep(0.5)
        health.beat(1)
    assert "Above: before step 1" in (tmp_path / "stacks/process_00000.txt").read_text()


@pytest.mark.parametrize("seconds, dumped", [(0.2, False), (0.7, True)])
def test_the_limit_is_ten_times_the_median(tmp_path, seconds, dumped):
    with Health(epath.Path(tmp_path), 0, least=0.01) as health:
        for step in range(1, 6):
            time.sleep(0.04)
            health.beat(step)
        time.sleep(seconds)
        health.beat(6)
    assert (tmp_path / "stacks/process_00000.txt").exists() is dumped
