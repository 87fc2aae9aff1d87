"""What the launchers share: arguments, shell templates, and starting the tool that submits."""

import argparse
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

import jinja2

from launch.accelerators import LaunchError
from launch.platforms.job import Job, load_job

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,  # these are shell scripts: every value goes through `quote`
)
_TEMPLATES.filters["quote"] = lambda value: shlex.quote(str(value))
_TEMPLATES.filters["join_quoted"] = shlex.join


def render(template: str, **values: object) -> str:
    """A shell script of launch/templates; `quote` and `join_quoted` make words of values."""
    return _TEMPLATES.get_template(template).render(**values).rstrip("\n") + "\n"


def launch(
    make: Callable[[Job], str], command: Sequence[str], argv: Sequence[str], *, as_argument: bool
) -> None:
    """Makes a job's text and gives it to a tool: as its last argument, or on its standard input.

    With --dry-run prints it instead. Ends the program, with the tool's status.
    """
    module = make.__module__ if make.__module__ != "__main__" else pathlib.Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(module)
    parser.add_argument("--job", required=True, help="a Python file that defines JOB")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change the config"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    given = parser.parse_args(argv)
    try:
        text = make(load_job(given.job, given.set))
        if given.dry_run:
            tool = " ".join(command)
            print(f"Would be given to `{tool}`:", file=sys.stderr)
            print(text, end="")
            return
        if shutil.which(command[0]) is None:
            raise LaunchError(
                f"{command[0]} is not installed here; install it, or use --dry-run to see what it "
                "would get."
            )
    except LaunchError as e:
        raise SystemExit(f"LaunchError: {e}") from e
    if as_argument:
        raise SystemExit(subprocess.run([*command, text]).returncode)
    raise SystemExit(subprocess.run(command, input=text, text=True).returncode)
