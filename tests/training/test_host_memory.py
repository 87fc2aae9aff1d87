"""A CPU step's temporaries stay with the process."""

import subprocess
import sys

# A program with 64 MiB of temporaries, run again and again; prints the pages each run had to fetch.
PROGRAM = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 4 KiB wherever this runs
import jax, jax.numpy as jnp
from ov2_jax.training.hosts.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
run = jax.jit(lambda x: (jnp.sin(x @ x.T) @ x).sum())
x = jnp.ones((4096, 64))
for _ in range(24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(x).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def fewest_pages_fetched(how: str) -> int:
    """Of the runs after the first two. A busy machine makes threads overlap as they did not before,
    and such a run needs more memory; the fewest do not depend on that."""
    command = [sys.executable, "-c", PROGRAM, how]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return min(int(line) for line in found.stdout.split()[2:])


def test_a_steps_memory_is_fetched_once():
    pages = 64 * 2**20 // 4096
    # Without the settings every run fetches its memory anew; otherwise this would test nothing.
    assert fewest_pages_fetched("free") > pages // 2
    assert fewest_pages_fetched("keep") < pages // 20
