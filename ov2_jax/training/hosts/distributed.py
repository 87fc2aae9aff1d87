"""Joining the other processes of a run, and stopping together with them."""

import os
import signal

import jax
from jax.experimental import multihost_utils

from ov2_jax.core.errors import ConfigError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Joins jax.distributed, before any other use of JAX.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name the others if they are set,
    which `launch` does. Otherwise JAX finds them itself, under Slurm, Open MPI and on Cloud TPU.
    Raises ConfigError.
    """
    given = [name for name in _VARIABLES if os.environ.get(name)]
    if "JAX_NUM_PROCESSES" not in given and "JAX_PROCESS_ID" not in given:
        try:
            jax.distributed.initialize()
        except ValueError as e:
            raise ConfigError(
                "distributed is set, but JAX finds neither Slurm, Open MPI nor Cloud TPU here "
                f"({e}); start the processes with `python -m launch.local`, or set "
                f"{', '.join(_VARIABLES)}."
            ) from e
        return
    if len(given) < len(_VARIABLES):
        raise ConfigError(f"Of {', '.join(_VARIABLES)} only {', '.join(given)} are set; set all.")
    try:
        count, index = (int(os.environ[name]) for name in _VARIABLES[1:])
        if not 0 <= index < count:
            raise ValueError(f"{index} is not one of {count} processes")
    except ValueError as e:
        raise ConfigError(f"JAX_PROCESS_ID and JAX_NUM_PROCESSES cannot be used: {e}.") from e
    jax.distributed.initialize(
        os.environ["JAX_COORDINATOR_ADDRESS"], count, index, cluster_detection_method="deactivate"
    )


class StopSignal:
    """SIGTERM asks for a last checkpoint and an orderly end, at the same step on every process.

    With several processes JAX's preemption service agrees on the step: it watches for SIGTERM from
    `join` on, and one process that gets it is enough.
    """

    def __init__(self) -> None:
        self._asked, self._calls = False, 0
        self._alone = jax.process_count() == 1

    def __enter__(self) -> "StopSignal":
        if self._alone:
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._previous)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Whether to stop after this step. Every process must call it at every step."""
        if self._alone:
            return self._asked
        # Counted from this start on: if SIGTERM comes before the first call, JAX agrees on the
        # number 1, which a run that resumes at step 5 would never reach.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)
