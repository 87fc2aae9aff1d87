"""What the model sees, as one HTML page.

    python -m ov2_jax.data.inspect --config=configs/quickstart.py --out=report.html

Packed rows, the exact text with its loss, every picture as the patches hold it, codec-style clips
frame by frame, how full the rows are, and what was set aside and why. The page needs no network.
No accelerator is touched, and nothing is written but the page.
"""

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from absl import app, flags, logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from conversion.errors import ConversionError
from ov2_jax.checkpoint_dir import CheckpointError
from ov2_jax.data.errors import DataError
from ov2_jax.data.inspect_page import Collector, render
from ov2_jax.data.inspect_road import open_road
from ov2_jax.data.tokenizer import load_tokenizer
from ov2_jax.model.config import ConfigError
from ov2_jax.train import parse_flags  # and --config with its overrides
from ov2_jax.training.config import Experiment, experiment_from
from ov2_jax.training.start import tokenizer_folder, with_checkpoint_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class InspectError(ValueError):
    """A page that cannot be written where it was asked for."""


def inspect_data(
    experiment: Experiment,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    count: int = 1000,
    samples: int = 24,
    title: str = "",
    command: str = "",
) -> str:
    """The page, from the first packs that a run of one process would train on.

    `count` samples are packed and counted, `samples` of them are shown with their pictures. Raises
    ConfigError and DataError where the data cannot be read at all.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("samples", total=count)
        road = open_road(
            experiment.data,
            experiment.pack,
            experiment.model,
            tokenizer,
            seed=experiment.seed,
            count=count,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
        collector = Collector(experiment.pack, experiment.model, road.names, samples)
        for pack in road:
            collector.add(pack)
        progress.update(bar, description="pictures")
        return render(
            collector,
            collector.details(tokenizer),
            road.rejected,
            title=title,
            command=command,
            aside=road.aside,
            origin=road.origin,
            epoch=road.epoch,
            seed=experiment.seed,
            pack=experiment.pack,
            model=experiment.model,
        )


def check_out(out: str | Path) -> Path:
    """Raises InspectError before an hour was spent on a page that cannot be written."""
    path = Path(out)
    if path.suffix not in (".html", ".htm"):
        raise InspectError(f"--out is {str(out)!r}; name an .html file.")
    if path.is_dir():
        raise InspectError(f"--out is {str(out)!r}, which is a folder; name an .html file.")
    if not path.parent.is_dir():
        raise InspectError(f"--out is {str(out)!r}, but there is no folder {str(path.parent)!r}.")
    return path


def write_page(page: str, path: Path) -> None:
    """Replaces the file whole: a killed run leaves no half page."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        # Ids and file names may hold lone surrogates, which UTF-8 has no bytes for.
        part.write_bytes(page.encode("utf-8", "backslashreplace"))
        part.replace(path)


def _define_flags() -> None:
    """Only where this is the program: absl's flags are global, and `out` is a common name."""
    flags.DEFINE_string("out", None, "The page to write, an .html file.")
    flags.DEFINE_integer("count", 1000, "Samples to pack; at most an epoch.", lower_bound=1)
    flags.DEFINE_integer("samples", 24, "Samples to show with pictures.", lower_bound=0)
    flags.mark_flags_as_required(["config", "out"])


def _experiment() -> Experiment:
    experiment = experiment_from(flags.FLAGS.config, needs_workdir=False)
    return with_checkpoint_model(experiment, resuming=False)[0]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_platforms", "cpu")  # beside a training run: its accelerator is its own
    try:
        path = check_out(flags.FLAGS.out)
        experiment = _experiment()
        folder = tokenizer_folder(experiment, resuming=False)
        tokenizer = load_tokenizer(folder, experiment.model)
        page = inspect_data(
            experiment,
            tokenizer,
            count=flags.FLAGS.count,
            samples=flags.FLAGS.samples,
            title=Path(flags.FLAGS["config"].config_filename).stem,
            command=shlex.join(["python", "-m", "ov2_jax.data.inspect", *sys.argv[1:]]),
        )
        write_page(page, path)
    except (ConfigError, DataError, CheckpointError, ConversionError, InspectError) as e:
        raise SystemExit(f"{type(e).__name__}: {e}") from e
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=parse_flags)
