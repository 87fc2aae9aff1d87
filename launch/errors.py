"""Errors that a user of a launcher or of the planner can cause."""

from ov2_jax.core.errors import UserError


class LaunchError(UserError):
    """A job, or a plan, that cannot be started as it is described; one sentence."""
