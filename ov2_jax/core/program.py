"""What all programs share: flags, and errors as one sentence.

    def define_flags() -> None:
        flags.DEFINE_string("out", None, "The folder to write.", required=True)

    def main(given: Given) -> None:
        print(given.out)

    if __name__ == "__main__":
        run(main, define_flags)

Flags are absl's, because ml_collections reads `--config` through them. absl's flags are global, so
a program defines its own only when it is the one that runs.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from ov2_jax.core.errors import UserError

# The values of a program's flags by name, `-` written `_`. With `config=True` also `config` (a
# ConfigDict with its overrides) and `config_file`; `rest` has what stands behind `--`.
Given = SimpleNamespace


def run(
    main: Callable[[Given], int | None],
    define_flags: Callable[[], None],
    *,
    config: bool = False,
    rest: bool = False,
    verbosity: int = logging.WARNING,
) -> None:
    """Parses the command line, calls `main`, and ends the program with the status it returns.

    Args:
      main: gets the flags' values; returns the exit status, None for 0.
      define_flags: defines the program's own flags.
      config: whether there is `--config=FILE` with overrides as `--config.a.b=VALUE`.
      rest: whether arguments that are no flags are taken; otherwise they are refused.
      verbosity: of absl's log. Orbax and Grain tell their whole life at INFO.

    A UserError becomes one sentence on stderr and status 1.
    """
    before = set(flags.FLAGS)
    define_flags()
    own = sorted(set(flags.FLAGS) - before)
    if config:
        config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.")
        flags.mark_flag_as_required("config")

    def with_flags(argv: list[str]) -> None:
        if argv[1:] and not rest:
            raise app.UsageError(f"Unknown arguments: {argv[1:]}")
        logging.set_verbosity(verbosity)
        given = Given(rest=argv[1:])
        for name in own:
            setattr(given, name.replace("-", "_"), flags.FLAGS[name].value)
        with user_errors():
            if config:
                given.config_file = Path(flags.FLAGS["config"].config_filename)
                given.config = flags.FLAGS["config"].value
            sys.exit(main(given))

    app.run(with_flags, flags_parser=_parse_flags)


@contextlib.contextmanager
def user_errors() -> Any:
    """Ends the program with one sentence and status 1 on a UserError."""
    try:
        yield
    except UserError as e:
        raise SystemExit(sentence(e)) from e


def sentence(error: UserError) -> str:
    return f"{type(error).__name__}: {error}"


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's flags, but an override of a field that the config lacks is one sentence."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as e:
        name = str(e).strip("\"'")
        given = [a for a in argv if a.startswith("--config.") and name in a.split("=")[0]]
        raise SystemExit(
            f"ConfigError: {' '.join(given)} names no field of the config ({name!r}); the fields "
            "are those of ov2_jax/config/."
        ) from e
