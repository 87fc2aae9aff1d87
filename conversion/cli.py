"""What the command lines of this package share: destination, progress bar, errors."""

import argparse
import contextlib
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

import absl.logging
import rich.console
import rich.progress
from etils import epath

from conversion.errors import ConversionError
from conversion.formats.safetensors_io import DEFAULT_MAX_SHARD_BYTES
from ov2_jax.core.errors import CheckpointError, ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@contextlib.contextmanager
def destination(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """A temporary sibling folder that becomes `path` when the block ends well, else vanishes."""
    target = pathlib.Path(path)
    if "://" in str(path):
        raise ConversionError(
            f"{path} is remote. Conversion writes to a local disk; copy the folder afterwards "
            "(for example with `gcloud storage cp -r`)."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{path} already exists; choose another place or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield made
        made.chmod(0o755)  # mkdtemp's folders are for their owner only
        made.rename(target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


@contextlib.contextmanager
def progress_bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, rate and time left on stderr; yields the function that advances it."""
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
    ) as progress:
        task = progress.add_task(title, total=total_bytes)
        yield lambda count: progress.advance(task, count)


def parse_bytes(text: str) -> int:
    """`5GB`, `512MiB` or a plain number of bytes."""
    digits = text.rstrip("BbKkMmGgIi ")
    unit = text[len(digits) :].strip().upper()
    if unit not in _UNITS or not digits.replace(".", "", 1).isdigit() or float(digits) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 512MiB.")
    return int(float(digits) * _UNITS[unit])


def parser(prog: str, doc: str) -> argparse.ArgumentParser:
    """An argument parser whose help is the module's docstring as it stands."""
    return argparse.ArgumentParser(
        prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_max_shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-shard-size",
        type=parse_bytes,
        default=DEFAULT_MAX_SHARD_BYTES,
        metavar="SIZE",
        help="largest safetensors file, e.g. 5GB (the default)",
    )


def main(run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parses and runs; what a user can put right ends the program as a message, status 1."""
    args = parser.parse_args()
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns of what is meant to be so
    try:
        run(args)
    except (ConversionError, ConfigError, CheckpointError) as error:
        sys.exit(f"error: {error}")
