"""A trace of a few steps, for XProf or TensorBoard's profile plugin."""

from typing import Any

import jax
from etils import epath


class Profiler:
    """Traces the steps (first, last) of `profile_steps` into WORKDIR/profile; () traces none."""

    def __init__(self, workdir: epath.Path, profile_steps: tuple[int, ...]) -> None:
        self._folder = workdir / "profile"
        self._first, self._last = profile_steps or (0, 0)
        self._tracing = False

    def before(self, step: int) -> None:
        """Called before step `step` (counted from 1) is started."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def after(self, step: int, result: Any) -> None:
        """Called once the step was started; `result` has its arrays."""
        if self._tracing and step == self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._tracing:  # the run ended before the last of them
            self._stop()
