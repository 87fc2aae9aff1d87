"""Errors that a user can cause.

Every program shows one as a single sentence and ends with status 1 (core/program.py). The message
names the field, path or file, its value, and the remedy.
"""


class UserError(Exception):
    """The base of all of them."""


class ConfigError(UserError):
    """A configuration that cannot work."""


class DataError(UserError):
    """Data that cannot be used as a whole; a single bad sample is rejected instead."""


class CheckpointError(UserError):
    """A folder that is no usable checkpoint."""


def describe(error: BaseException) -> str:
    """The class of an exception and its text, also if the text cannot be had."""
    try:
        text = str(error)
    except Exception:  # one that a broken file made, from bytes that are no text
        text = "it has no text"
    return f"{type(error).__name__}: {text}"
