"""The frame of every program: flags, errors as one sentence, and the exit status.

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
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from ov2_jax.core.errors import ConfigError, UserError

# The values of a program's flags by name, with `_` for `-`. With `config=True` it also has `config`
# (a ConfigDict with its overrides) and `config_file`. `rest` has the arguments after `--`.
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

    A UserError becomes one sentence on stderr and status 1, and so does an unknown argument.

    Args:
      main: gets the flags' values; returns the exit status, None for 0.
      define_flags: defines the program's own flags.
      config: whether there is `--config=FILE`, with overrides as `--config.a.b=VALUE`.
      rest: whether the program takes arguments that are not flags.
      verbosity: of absl's log. At INFO, Orbax and Grain log every action.
    """
    before = set(flags.FLAGS)
    define_flags()
    own = sorted(set(flags.FLAGS) - before)
    if config:
        config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.")
        flags.mark_flag_as_required("config")

    def with_flags(argv: list[str]) -> None:
        if argv[1:] and not rest:
            raise SystemExit(f"Unknown arguments: {' '.join(argv[1:])}; --help lists the flags.")
        logging.set_verbosity(verbosity)
        given = Given(rest=argv[1:])
        for name in own:
            setattr(given, name.replace("-", "_"), flags.FLAGS[name].value)
        with user_errors():
            if config:
                given.config = _config()
                given.config_file = Path(flags.FLAGS["config"].config_filename)
            sys.exit(main(given))

    app.run(with_flags, flags_parser=_parse_flags)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with one sentence and status 1 on a UserError."""
    try:
        yield
    except UserError as e:
        raise SystemExit(sentence(e)) from e


def sentence(error: UserError) -> str:
    return f"{type(error).__name__}: {error}"


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's flags, with one sentence for an error in `--config` or its overrides."""
    with user_errors():
        try:
            return app.parse_flags_with_usage(argv)
        except OSError as e:
            raise _not_loaded(e) from e
        except (AttributeError, IndexError, KeyError) as e:
            if not _in_overrides(e):  # a bug of the config file; its traceback has the line
                raise
            paths = {a: a[9:].split("=")[0] for a in argv if a.startswith("--config.")}
            words = re.findall(r"\w+", str(e).split("\\n")[0])  # what follows is a suggestion
            named = [a for a, path in paths.items() if {*re.findall(r"\w+", path)} & {*words}]
            raise ConfigError(
                f"{' or '.join(named or paths)} names no field of the config; the fields are "
                "those of ov2_jax/config/."
            ) from e


def _in_overrides(error: Exception) -> bool:
    """Whether ml_collections raised it when it looked up the field of an override."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals["__name__"] == config_path.__name__ for frame, _ in frames)


def _config() -> ConfigDict:
    """The value of `--config`; ml_collections reports a missing file only at the first use."""
    config = flags.FLAGS["config"].value
    try:
        config.keys()
    except OSError as e:
        raise _not_loaded(e) from e
    return config


def _not_loaded(error: OSError) -> ConfigError:
    reason = str(error.__cause__ or error).splitlines()[-1].strip()
    return ConfigError(f"The file that --config names cannot be loaded: {reason}.")
