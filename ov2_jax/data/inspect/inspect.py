"""What the model sees, as one HTML page.

    python -m ov2_jax.data.inspect --config=configs/quickstart.py --out=report.html

Packed rows, the exact text with its loss, every picture as the patches hold it, codec-style clips
frame by frame, how full the rows are, and what was set aside and why. The page needs no network.
No accelerator is touched, and nothing is written but the page.
"""

import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ov2_jax.config.experiment import Experiment
from ov2_jax.core.errors import UserError
from ov2_jax.data.encoding.tokenizer import Tokenizer
from ov2_jax.data.inspect.packs import open_road
from ov2_jax.data.inspect.page import Collector, render


class InspectError(UserError):
    """A page that cannot be written where it was asked for."""


def inspect_data(
    experiment: Experiment,
    tokenizer: Tokenizer,
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
